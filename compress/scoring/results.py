"""Values that go into a scorecard as they are: what a task gave, and what was done otherwise than planned."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.scoring.intervals import Interval


class Value(BaseModel):
    """Frozen; unknown keys are kept out on reading so that a newer minor version's file still opens."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Flips(Value):
    """How many of `n` documents changed sides between the original and a variant, as shares of all documents with Wilson's
    95% intervals: `lost` were right and are wrong, `gained` the other way round.

    lost + gained is what "Accuracy is not all you need" (arXiv 2407.09141) calls flips, gained - lost the change of the
    accuracy, which hides most of them. `changed` also counts wrong answers that became other wrong ones; None where a task
    keeps no answers (a greedy last word is right or not).
    """

    n: int
    lost: Interval
    gained: Interval
    changed: Interval | None = None


class TaskScore(Value):
    """One row of a task. The row by the task's own name is its headline; others stand behind a dot: a further metric, or a
    group of its documents (then `group` is its name).

    metric      as lm-eval calls it, or "word perplexity";  value, low, high: mean over documents with its 95% interval
    difference  from the original, paired by document: {"metric", "value", "low", "high", "n"}; None for perplexities
    title       what a table calls the task;  kind: what the value is: a share of documents in [0, 1], the mean of another
                number, a perplexity ("" in older scorecards)
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    difference: dict[str, Any] | None = None
    flips: Flips | None = None
    group: str = ""
    title: str = ""
    kind: Literal["", "share", "mean", "perplexity"] = ""

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of documents, 0 to 1."""
        return self.kind == "share" or (not self.kind and not self.metric.endswith("perplexity"))

    @property
    def change(self) -> Interval | None:
        """`difference` as an estimate, of a share; None without an original."""
        if not self.is_share or not self.difference or self.difference.get("value") is None:
            return None
        return Interval(self.difference["value"], self.difference.get("low"), self.difference.get("high"))


def headline(task: str) -> bool:
    """Per-phenomenon rows ("blimp.island_effects") stay in scorecard.json; tables have the totals."""
    return "." not in task or task.endswith(".perplexity")


def task_title(task: str, title: str = "") -> tuple[str, str]:
    """A task's name as it is written, and the metric of a row of its own or "". title: what its row says."""
    name, _, metric = task.partition(".")
    return title or {"blimp": "BLiMP", "lambada": "LAMBADA"}.get(name, name), metric  # of older scorecards


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
    """Something done otherwise than planned: `subject` (a tensor, usually) was to get `wanted` and got `used`.

    role: what the subject is one of (a tensor's role), "" where it stands for itself; cure: what to ask for so that it does not
    come to this, "" where nothing is known.
    """

    subject: str
    wanted: str
    used: str
    reason: str
    role: str = ""
    cure: str = ""
