"""One sub-layer compressed: stage by stage collect statistics and solve, each stage observing the earlier ones as compressed.

Two streams of calibration activations go through the model side by side, the original's and the compressed
model's, so that every solver sees the inputs its weight will really get and how far they have drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from compress.decode import decode
from compress.models.spec import Branch
from compress.plan.tensor import PlannedTensor
from compress.run.collect import Site, collect, counted, stage_groups, statistics_of
from compress.run.scaling import Folded, scale_sublayer
from compress.solve.tensor import Outcome, Shipped, Solved, as_stored, solve_tensor
from compress.statistics import Moments
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Streams
from compress.transforms.options import TransformOptions
from compress.weights import Loader, Packed


@dataclass(frozen=True)
class Job:
    """What is asked of every sub-layer. transforms: scalings that come first; seed: the recipe's; tell: hears of every tensor
    that is solved."""

    load: Loader
    transforms: Sequence[TransformOptions] = ()
    seed: int = 0
    placement: Placement = CPU
    tell: Callable[[Solved], None] = lambda report: None


@dataclass(frozen=True)
class Result:
    """packed: every tensor of a sub-layer as it ships; outcomes: one a solved tensor; tokens: per expert; original,
    weights: the float32 weights before and after, by checkpoint name, the former as transforms left them; folded: what
    those did."""

    packed: dict[str, Packed] = field(default_factory=dict)
    outcomes: dict[str, Outcome | Shipped] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    original: Mapping[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    folded: tuple[Folded, ...] = ()

    @property
    def solved(self) -> tuple[Solved, ...]:
        """One report a solved tensor."""
        return tuple(outcome.report for outcome in self.outcomes.values())


def compress_sublayer(
    branch: Branch,
    tensors: Sequence[PlannedTensor],
    streams: Streams | None,
    job: Job,
    progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Compress one sub-layer.

    tensors: its own; streams: activations in front of it. progress receives the number of tensors that are done.
    """
    placement = job.placement
    original = {t.name: placement.weight(job.load(t.name)) for t in tensors}
    folded: tuple[Folded, ...] = ()
    if streams is not None and job.transforms:
        original, folded = scale_sublayer(branch, tensors, original, streams, job.transforms)
    weights, packed = dict(original), {}
    for planned in tensors:
        if planned.method is None:
            packed[planned.name] = as_stored(planned, original[planned.name])
            weights[planned.name] = placement.put(decode(packed[planned.name]))
    result = Result(packed, {}, (), original, weights, folded)
    site = None if streams is None else Site(branch, streams, original, weights)
    for stage in range(branch.sublayer.stages):
        for group in stage_groups(branch, stage, tensors):
            moments = {} if site is None else collect(site, stage, group)
            if site is not None and not site.tokens:
                site.tokens = counted(branch, stage, moments)
            _solve(branch, group, moments, result, job, progress)
    return Result(packed, result.outcomes, () if site is None else site.tokens, original, weights, folded)


def _solve(
    branch: Branch,
    group: Sequence[PlannedTensor],
    moments: Mapping[str, Moments],
    result: Result,
    job: Job,
    progress: Callable[[int], None],
) -> None:
    """Solve tensors that do not see each other, side by side; into `result`."""

    def one(planned: PlannedTensor) -> tuple[Outcome | Shipped, Packed, Tensor]:
        statistics = statistics_of(branch, planned, moments)
        outcome = solve_tensor(planned, result.original[planned.name], statistics, job.seed)
        packed = outcome.pack()
        return outcome, packed, job.placement.put(decode(packed))

    with job.placement.workers(len(group)) as workers, ThreadPoolExecutor(workers) as pool:
        for planned, (outcome, packed, dense) in zip(group, pool.map(one, group), strict=True):
            name = planned.name
            result.outcomes[name], result.packed[name], result.weights[name] = outcome, packed, dense
            job.tell(outcome.report)
            progress(len(result.packed))
