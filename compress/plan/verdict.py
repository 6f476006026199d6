"""Does it fit, and how long: a plan held against a machine. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.machine import Machine, free_disk
from compress.plan.duration import Duration
from compress.plan.running import Room, Running, rooms, running

if TYPE_CHECKING:
    from compress.plan.plan import Plan

Replan = Callable[[Sequence[str]], "Plan"]
"""The plan with some more `key=value` of --set."""
FEWEST_SAMPLES = 64
"""Calibration windows below which no remedy goes."""
NOTABLE = 0.98
"""Of a need: what brings it down by less is not worth a setting."""


@dataclass(frozen=True)
class Remedy:
    """Values of `--set` that bring a need down, and to how many bytes, as the plan with them says."""

    settings: tuple[str, ...]
    needed: int


@dataclass(frozen=True)
class Need:
    """What making the model takes of one thing. there: bytes of it, None where nothing tells; words: what these are."""

    what: str
    needed: int
    there: int | None
    words: str = "that are free"
    remedy: Remedy | None = None

    @property
    def fits(self) -> bool | None:
        return None if self.there is None else self.needed <= self.there


@dataclass(frozen=True)
class Held:
    """An artifact in an engine on this machine. room: the fastest place that holds it, else the largest, None where there is
    none; contexts: codec of the cache -> the longest context there."""

    running: Running
    room: Room | None
    contexts: tuple[tuple[str, int], ...] = ()

    @property
    def fits(self) -> bool | None:
        if self.room is None:
            return None
        return any(context >= self.running.least for _, context in self.contexts)

    @property
    def least(self) -> int:
        """Bytes that it takes with the shortest context worth having."""
        return self.running.needed(self.running.least, self.running.codecs[0])


@dataclass(frozen=True)
class Verdict:
    """memory, disk: to make it; missing: bytes of the original that are not on this machine yet; held: to run it, every artifact
    in every engine; duration: None where nothing tells."""

    memory: Need
    disk: Need
    missing: int
    held: tuple[Held, ...]
    duration: Duration | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "memory": {**asdict(self.memory), "fits": self.memory.fits},
            "disk": {**asdict(self.disk), "fits": self.disk.fits},
            "missing_bytes": self.missing,
            "run": [
                {
                    **one.running.as_dict(),
                    "where": None if one.room is None else one.room.words,
                    "there": None if one.room is None else one.room.there,
                    "needed": one.least,
                    "fits": one.fits,
                    "context": dict(one.contexts),
                }
                for one in self.held
            ],
            "time": None if self.duration is None else self.duration.as_dict(),
        }


def judge(
    plan: Plan,
    machine: Machine,
    *,
    duration: Duration | None = None,
    free: int | None = None,
    replan: Replan | None = None,
) -> Verdict:
    """Hold a plan against a machine. free: bytes of disk, by default those where the output goes; replan: for a remedy of what
    does not fit."""
    free = free_disk(Path(plan.recipe.output)) if free is None else free
    memory = Need("memory", plan.peak_memory_bytes, machine.memory.there, machine.memory.words)
    return Verdict(
        _helped(plan, memory, replan),
        _helped(plan, Need("disk", plan.disk_bytes, free), replan),
        0 if plan.stamp else plan.source_bytes,
        tuple(hold(one, machine) for one in running(plan)),
        duration,
    )


def hold(one: Running, machine: Machine) -> Held:
    """Where a machine holds an artifact best."""
    found = [
        Held(one, room, tuple((codec, one.context(room.there, codec)) for codec in one.codecs))
        for room in rooms(one.host, machine)
    ]
    fitting = (held for held in found if held.fits)
    return next(fitting, max(found, key=lambda held: held.room.there if held.room else 0, default=Held(one, None)))


# ------------------------------------------------------------------------------------ what would make it fit


def _helped(plan: Plan, need: Need, replan: Replan | None) -> Need:
    """A need with what would bring it down, where it does not fit."""
    if need.fits is not False or replan is None:
        return need
    return replace(need, remedy=_remedy(plan, need, replan))


def _remedy(plan: Plan, need: Need, replan: Replan) -> Remedy | None:
    """Settings that together need less, as few as fit, the least harm first; those that do not fit either where none do. What
    each gains is asked of a plan; one that gains nothing is left out."""
    found: Remedy | None = None
    for setting in _settings(plan, need):
        settings = (*(found.settings if found else ()), setting)
        try:
            needed = _of(need.what, replan(settings))
        except CompressError:  # not with this model
            continue
        if needed < NOTABLE * (found.needed if found else need.needed):
            found = Remedy(settings, needed)
            if need.there is not None and needed <= need.there:
                break
    return found


def _of(what: str, plan: Plan) -> int:
    return plan.peak_memory_bytes if what == "memory" else plan.disk_bytes


def _settings(plan: Plan, need: Need) -> Iterator[str]:
    """What may be set otherwise in a recipe so that a run takes less, the least harm first."""
    recipe = plan.recipe
    at = {step.kind: n for n, step in enumerate(recipe.steps)}
    if need.what == "disk" and plan.activation_bytes:
        yield f"calibration.samples={_samples(plan, need)}"
    if need.what == "disk" and len(recipe.export) > 1:
        yield f"export=[{{container: {recipe.export[0].container}}}]"
    if plan.recover is not None and plan.recover.end_to_end:
        yield f"steps[{at['recover']}].recover.end_to_end=0"
    if need.what == "memory":
        for kind, option in product(at, ("drift", "residual")):
            if getattr(getattr(recipe.step(kind), "solver", None), option, 0):
                yield f"steps[{at[kind]}].{kind}.solver.{option}=0"


def _samples(plan: Plan, need: Need) -> int:
    """Half the calibration windows, or half of those, ..., until they fit."""
    samples = plan.recipe.calibration.samples
    while samples >= 2 * FEWEST_SAMPLES:
        samples //= 2
        text = plan.recipe.calibration.model_copy(update={"samples": samples})
        if replace(plan, recipe=plan.recipe.model_copy(update={"calibration": text})).disk_bytes <= (need.there or 0):
            break
    return samples
