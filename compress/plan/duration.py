"""How long a run will take, from a finished one on this machine that took the same steps. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.files import checksum
from compress.machine import DEVICE, threads
from compress.machine.measured import Measured, Runs

if TYPE_CHECKING:
    from compress.machine import Machine
    from compress.plan.plan import Plan

FURTHEST = 16.0
"""Times more or less work of any kind than was measured: beyond that overheads and caches of processors make a line through
one point worthless, and nothing is said."""


@dataclass(frozen=True)
class Duration:
    """Wall seconds of a run between two bounds, and where they come from, in words."""

    low: float
    high: float
    source: str

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {"seconds": [round(self.low, 1), round(self.high, 1)], "source": self.source}


def runs_like(plan: Plan, machine: Machine, device: str | None = None) -> Runs:
    """Finished runs of a plan's own steps. device: its kind; by default what COMPRESS_DEVICE names, else the CPU."""
    kind = (device or os.environ.get(DEVICE) or "cpu").partition(":")[0]
    said = plan.recipe.model_dump(mode="json", include={"steps", "export", "score"})
    return Runs(machine, threads(), kind, checksum(json.dumps(said, sort_keys=True).encode()))


def work(plan: Plan) -> Mapping[str, float]:
    """What a run does, by what its parts grow with: weights that are read and stored; for solvers, which go over a row's columns
    again and again, weights times columns; for text, tokens times the weights that each passes through."""
    share = plan.spec.experts_per_token / max(plan.spec.experts, 1)
    decoder = ((t, n) for t, n in plan.counted if not t.spec.beside)
    active = sum(n * t.spec.parameters * (1.0 if t.spec.expert is None else share) for t, n in decoder)
    solved = sum(n * t.spec.parameters * t.spec.shape[-1] for t, n in plan.counted if t.method is not None)
    text = plan.recipe.calibration.samples * plan.recipe.calibration.length if plan.needs_calibration else 0
    found = {"weights": plan.parameters, "solving": solved, "text": text * active, "passes": active}
    return {kind: float(amount) for kind, amount in found.items() if amount}


def duration(plan: Plan, runs: Iterable[Measured]) -> Duration | None:
    """The seconds of the run most like this one, times the least and the most that any kind of work grows by; None where none
    is like it."""
    wanted = work(plan)
    near = []
    for run in runs:
        if set(run.work) == set(wanted):
            ratios = [wanted[kind] / run.work[kind] for kind in wanted]
            near.append((max(abs(math.log(ratio)) for ratio in ratios), min(ratios), max(ratios), run))
    if not near:
        return None
    distance, least, most, run = min(near, key=lambda found: found[0])
    if distance > math.log(FURTHEST):
        return None
    scaled = "scaled from" if distance > math.log(1.05) else "from"
    source = f"{scaled} a run of {run.model} on this machine at {run.date[:10]}"
    return Duration(least * run.seconds, most * run.seconds, source)
