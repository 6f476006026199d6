"""A look at the original before the work: every weight finite, no matrix of one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.models.checkpoint import Checkpoint
from compress.models.surplus import some_of
from compress.plan.plan import Plan
from compress.report.progress import Reporter
from compress.streaming.journal import Journal

INSPECTED = "inspected"  # the journal's unit


def inspect_weights(plan: Plan, checkpoint: Checkpoint, progress: Callable[[float], None]) -> list[str]:
    """Read the weights once, file by file; a line for matrices that hold one value everywhere, which training leaves nowhere.

    Raises CheckpointError for values that are not finite.
    """
    entries = checkpoint.entries
    parts = ((t.name, entries[t.name].part) for t in plan.original.tensors())
    wanted = sorted({name if part is None else part.name for name, part in parts}, key=lambda name: entries[name].span)
    total = sum(entries[name].bytes for name in wanted)
    constant: dict[str, list[str]] = {}
    done = 0
    for file in sorted({entries[name].file for name in wanted}):
        names = [name for name in wanted if entries[name].file == file]
        with entries[names[0]].opened() as stored:
            for name in names:
                low, high = _extremes(entries[name].matrices(name, stored))
                if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                    checkpoint.load(name)  # says how many are not
                if len(entries[name].shape) > 1 and (same := low == high).any():
                    constant.setdefault("zero" if not low[same].any() else "one value", []).append(name)
                done += entries[name].bytes
                progress(done / total)
    return [
        f"the original may be damaged or unfinished: all {what} in {some_of(names)}" for what, names in constant.items()
    ]


def _extremes(matrices: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Least and largest value of each, NaN where there is one; by rows it would take 20 times as long."""
    parts = [torch.aminmax(matrix) for matrix in matrices]
    return torch.stack([low for low, _ in parts]), torch.stack([high for _, high in parts])


def inspect(plan: Plan, checkpoint: Checkpoint, journal: Journal, reporter: Reporter, strict: bool) -> None:
    """Look at the original's weights once. Raises CheckpointError for values that are not finite; strict: for whatever
    speaks against it."""
    if INSPECTED not in journal:
        with reporter.stage("check weights") as progress:
            found = inspect_weights(plan, checkpoint, progress)
        for line in found:
            reporter.say(f"note: {line}")
        journal.finish(INSPECTED, {}, {"doubts": found})
    if strict and (doubts := (*plan.doubts, *journal.units[INSPECTED]["doubts"])):
        raise CheckpointError(f"{doubts[0]}; --strict stops here")
