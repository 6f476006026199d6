"""Values that go into a scorecard as they are: what a task gave, and what was done otherwise than planned."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.scoring.divergence import Interval


class Value(BaseModel):
    """Frozen; unknown keys are kept out on reading so that a newer minor version's file still opens."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Flips(Value):
    """Answers that changed against the original, as shares of the n documents: `lost` were right in the original and are
    wrong now, `gained` the other way round. The change of accuracy is gained - lost."""

    n: int
    lost: Interval
    gained: Interval


class TaskScore(Value):
    """One row of compress.scoring.tasks.run_tasks. `difference` is against the original, paired by document:
    {"value", "low", "high"} from compress.scoring.tasks.compare. flips: for tasks with right and wrong answers; group: the
    heading under which a table shows the task."""

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    difference: dict[str, Any] | None = None
    flips: Flips | None = None
    group: str = ""

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of documents, 0 to 1."""
        return not self.metric.endswith("perplexity")

    @property
    def change(self) -> Interval | None:
        """`difference` as an estimate; None without an original."""
        if not self.difference or self.difference.get("value") is None:
            return None
        return Interval(self.difference["value"], self.difference.get("low"), self.difference.get("high"))


def headline(task: str) -> bool:
    """Per-phenomenon rows ("blimp.island_effects") stay in scorecard.json; tables have the totals."""
    return "." not in task or task.endswith(".perplexity")


def task_title(task: str) -> tuple[str, str]:
    """A task's name as it is written, and the metric of a row of its own or ""."""
    name, _, metric = task.partition(".")
    return {"blimp": "BLiMP", "lambada": "LAMBADA"}.get(name, name), metric


class Spread(Value):
    """Median of repeated measurements, with the least and the greatest of them."""

    median: float
    low: float
    high: float


class Speed(Value):
    """How fast one engine runs a model, measured in turns with the original.

    prompt, generation: tokens/s; first_token: seconds from a prompt of `prompt_tokens` to the first new token; load:
    seconds; peak_bytes: resident memory. ratio: of those measures, by name, to the original's in the same run.
    """

    engine: str
    threads: int
    prompt_tokens: int
    generated_tokens: int
    repetitions: int
    prompt: Spread
    generation: Spread
    first_token: Spread
    load: Spread
    peak_bytes: int
    ratio: dict[str, Spread] = Field(default_factory=dict)


class Fallback(Value):
    """Something done otherwise than planned: `subject` (a tensor, usually) was to get `wanted` and got `used`."""

    subject: str
    wanted: str
    used: str
    reason: str
