"""Values that go into a scorecard as they are: what a task gave, and what was done otherwise than planned."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """Frozen; unknown keys are kept out on reading so that a newer minor version's file still opens."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TaskScore(Value):
    """One row of compress.scoring.tasks.run_tasks. `difference` is against the original, paired by document:
    {"value", "low", "high"} from compress.scoring.tasks.compare."""

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    difference: dict[str, Any] | None = None


class Fallback(Value):
    """Something done otherwise than planned: `subject` (a tensor, usually) was to get `wanted` and got `used`."""

    subject: str
    wanted: str
    used: str
    reason: str
