"""One sub-layer compressed: stage by stage collect statistics and solve, each stage observing the earlier ones as compressed.

Two streams of calibration activations go through the model side by side, the original's and the compressed
model's, so that every solver sees the inputs its weight will really get and how far they have drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor

from compress.decode import decode
from compress.models.spec import Branch
from compress.plan.tensor import PlannedTensor
from compress.run.collect import Site, collect, counted, stage_groups, statistics_of
from compress.run.scaling import Folded, scale_sublayer
from compress.solve.tensor import Outcome, Shipped, Solved, as_stored
from compress.solve.together import Task, solve_together, stacks_of
from compress.statistics import Moments
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Streams
from compress.transforms.options import TransformOptions
from compress.weights import Loader, Packed


@dataclass(frozen=True)
class Job:
    """What is asked of every sub-layer. transforms: scalings that come first; seed: the recipe's; tell: hears of every tensor
    that is solved. original_inputs: solvers see what the original's weights see; squares: the sums are wanted that an
    importance matrix is made of."""

    load: Loader
    transforms: Sequence[TransformOptions] = ()
    seed: int = 0
    placement: Placement = CPU
    tell: Callable[[Solved], None] = lambda report: None
    original_inputs: bool = False
    squares: bool = False


@dataclass(frozen=True)
class Result:
    """packed: every tensor of a sub-layer as it ships; outcomes: one a solved tensor; tokens: per expert; original,
    weights: the float32 weights before and after, by checkpoint name, the former as transforms left them; folded: what
    those did; squares: of every input by key, float32 [n] sums over all tokens and their number, where they are wanted."""

    packed: dict[str, Packed] = field(default_factory=dict)
    outcomes: dict[str, Outcome | Shipped] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    original: Mapping[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    folded: tuple[Folded, ...] = ()
    squares: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def solved(self) -> tuple[Solved, ...]:
        """One report a solved tensor."""
        return tuple(outcome.report for outcome in self.outcomes.values())


def compress_sublayer(
    branch: Branch,
    tensors: Sequence[PlannedTensor],
    streams: Streams | None,
    job: Job,
    progress: Callable[[float], None] = lambda done: None,
) -> Result:
    """Compress one sub-layer.

    tensors: its own; streams: activations in front of it. progress receives the number of tensors that are done; one whose
    inputs have been observed is half done.
    """
    (result,) = compress_variants(branch, [tensors], streams, job, progress)
    return result


def compress_variants(
    branch: Branch,
    variants: Sequence[Sequence[PlannedTensor]],
    streams: Streams | None,
    job: Job,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Result]:
    """Compress one sub-layer in several ways, all of which see the original's inputs: they are observed once, and every
    result is what its variant alone would have been.

    variants: the sub-layer's tensors as each plan has them. progress as above, of one variant.
    """
    assert len(variants) == 1 or job.original_inputs
    original = {t.name: job.placement.weight(job.load(t.name)) for t in variants[0]}
    folded: tuple[Folded, ...] = ()
    if streams is not None and job.transforms:
        original, folded = scale_sublayer(branch, variants[0], original, streams, job.transforms)
    results = [_unsolved(tensors, original, folded, job.placement) for tensors in variants]
    site = None
    if streams is not None:
        seen = original if job.original_inputs else results[0].weights
        site = Site(branch, streams, original, seen, job.squares)
    asked = list({t.name: t for tensors in variants for t in tensors if t.method is not None}.values())
    for stage in range(branch.sublayer.stages):
        for group in stage_groups(branch, stage, asked):
            moments = {} if site is None else collect(site, stage, group, _half(results, group, progress))
            if site is not None and not site.tokens:
                site.tokens = counted(branch, stage, moments)
            names = {t.name for t in group}
            for number, (tensors, result) in enumerate(zip(variants, results, strict=True)):
                own = [t for t in tensors if t.name in names and t.method is not None]
                left = [t for t in own if not _taken_over(t, variants[:number], results, result)]
                _solve(branch, left, moments, result, job, _share(results, number, group, progress))
                result.squares.update(
                    {key: (m.squares, m.tokens) for key, m in moments.items() if m.squares is not None}
                )
    return [replace(result, tokens=() if site is None else site.tokens) for result in results]


def _unsolved(
    tensors: Sequence[PlannedTensor], original: Mapping[str, Tensor], folded: tuple[Folded, ...], placement: Placement
) -> Result:
    """A result with what no solver touches."""
    result = Result(original=original, weights=dict(original), folded=folded)
    for planned in tensors:
        if planned.method is None:
            packed = as_stored(planned, original[planned.name])
            result.packed[planned.name] = packed
            result.weights[planned.name] = placement.put(decode(packed))
    return result


def _taken_over(
    planned: PlannedTensor, earlier: Sequence[Sequence[PlannedTensor]], results: Sequence[Result], result: Result
) -> bool:
    """Whether an earlier variant has solved the same tensor in the same way; then it goes into `result`."""
    for tensors, solved in zip(earlier, results, strict=False):
        if planned.name in solved.outcomes and any(planned.same_work(t) for t in tensors):
            result.outcomes[planned.name] = solved.outcomes[planned.name]
            result.packed[planned.name] = solved.packed[planned.name]
            result.weights[planned.name] = solved.weights[planned.name]
            return True
    return False


def _half(
    results: Sequence[Result], group: Sequence[PlannedTensor], progress: Callable[[float], None]
) -> Callable[[float], None]:
    """Progress of observing a group's inputs, a half of its share."""
    before = sum(len(result.packed) for result in results) / len(results)
    return lambda share: progress(before + len(group) / 2 * share)


def _share(
    results: Sequence[Result], number: int, group: Sequence[PlannedTensor], progress: Callable[[float], None]
) -> Callable[[float], None]:
    """Progress of solving a group for one of several variants; those behind it have been observed."""
    others = len(group) / 2 * (len(results) - number - 1)
    others += sum(len(result.packed) for n, result in enumerate(results) if n != number)
    return lambda done: progress((others + done) / len(results))


def _solve(
    branch: Branch,
    group: Sequence[PlannedTensor],
    moments: Mapping[str, Moments],
    result: Result,
    job: Job,
    progress: Callable[[float], None],
) -> None:
    """Solve tensors that do not see each other, side by side; into `result`."""
    observed = len(result.packed) + len(group) / 2
    solved: dict[str, tuple[Outcome | Shipped, Packed, Tensor]] = {}

    def some(stack: Sequence[Sequence[PlannedTensor]]) -> dict[str, tuple[Outcome | Shipped, Packed, Tensor]]:
        problems = []
        for members in stack:  # of one input and one method, and so with the same statistics
            seen = statistics_of(branch, members[0], moments)
            problems.append([Task(planned, result.original[planned.name], seen) for planned in members])
        found = {}
        for planned, outcome in zip(chain.from_iterable(stack), solve_together(problems, job.seed), strict=True):
            packed = outcome.pack()
            found[planned.name] = outcome, packed, job.placement.put(decode(packed))
        return found

    work = stacks_of(group, job.placement.solvers, job.placement.solve_bytes)
    with job.placement.workers(len(work)) as workers, ThreadPoolExecutor(workers) as pool:
        for found in pool.map(some, work):
            solved |= found
            for outcome, _, _ in found.values():
                job.tell(outcome.report)
            progress(observed + len(solved) / 2)
    for name in (planned.name for planned in group):
        result.outcomes[name], result.packed[name], result.weights[name] = solved[name]
