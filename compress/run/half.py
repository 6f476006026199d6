"""One block at a time: collect statistics, solve, run the compressed block, hand its activations on.

Two streams of calibration activations go through the model side by side, the original's and the compressed
model's, so that every solver sees the inputs its weight will really get and how far they have drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.engines.streamed import StreamedSource
from compress.errors import NumericalError
from compress.limits import MOMENTS_BYTES
from compress.models.forward import Pooled, Routing, forward_attention, forward_ffn, rms_norm, stage_of
from compress.models.spec import ModelSpec
from compress.plan.tensor import PlannedTensor, moments_bytes, repairs_residual
from compress.run.scaling import Folded, prepare_half
from compress.solve.tensor import Outcome, Shipped, Solved, as_stored, decode, solve_tensor
from compress.statistics import Moments, Statistics, blend
from compress.streaming.journal import Activations
from compress.streaming.walk import STAGES_OF, Half, Streams
from compress.transforms.options import TransformOptions
from compress.weights import Packed

POOL_TOKENS_PER_COLUMN = 8  # tokens that a cold expert's pool holds, per input column


@dataclass(frozen=True)
class HalfResult:
    """packed: every tensor of half a block as it ships; outcomes: one a solved tensor; tokens: per expert; original,
    weights: the float32 weights before and after, by checkpoint name, the former as transforms left them; folded: what
    those did."""

    packed: Mapping[str, Packed]
    outcomes: Mapping[str, Outcome | Shipped]
    tokens: tuple[int, ...]
    original: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    folded: tuple[Folded, ...] = ()

    @property
    def solved(self) -> tuple[Solved, ...]:
        """One report a solved tensor."""
        return tuple(outcome.report for outcome in self.outcomes.values())


@contextmanager
def _single_threaded(jobs: int) -> Iterator[int]:
    """Threads for `jobs` independent solves: one each when there are enough of them to fill the cores."""
    cores = torch.get_num_threads()
    if jobs < cores or cores == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def compress_half(
    spec: ModelSpec,
    layer: int,
    half: Half,
    block: Sequence[PlannedTensor],
    load: Callable[[str], Tensor],
    streams: Streams | None,
    progress: Callable[[int], None] = lambda done: None,
    *,
    transforms: Sequence[TransformOptions] = (),
    seed: int = 0,
) -> HalfResult:
    """Compress the attention or the feed-forward half of a block, each stage observing the earlier ones as compressed.

    block: the tensors of this half; load(name) gives a checkpoint tensor; streams: activations at the input of this
    half; transforms: scalings that come first. progress receives the number of tensors that are done.
    """
    original = {t.name: load(t.name).float() for t in block}
    folded: tuple[Folded, ...] = ()
    if streams is not None and transforms:
        original, folded = prepare_half(spec, layer, half, block, original, streams, transforms)
    weights = dict(original)
    packed: dict[str, Packed] = {}
    outcomes: dict[str, Outcome | Shipped] = {}
    for planned in block:
        if planned.method is None:
            packed[planned.name] = as_stored(planned, original[planned.name])
            weights[planned.name] = decode(packed[planned.name])
    tokens: tuple[int, ...] = ()
    groups = [(stage, group) for stage in STAGES_OF[half] for group in stage_groups(spec, stage, block)]
    for stage, group in groups:
        moments: dict[str, Moments] = {}
        if streams is not None:
            moments = collect(spec, layer, stage, group, original, weights, streams, tokens)
            if spec.is_sparse(layer) and stage == 2 and not tokens:
                tokens = tuple(moments[f"experts.{e}.in"].tokens for e in range(spec.experts))

        def one(planned: PlannedTensor, moments: dict[str, Moments] = moments) -> tuple[Any, Packed, Tensor]:
            outcome = solve_tensor(planned, original[planned.name], statistics_of(planned, moments), seed)
            result = outcome.pack()
            return outcome, result, decode(result)

        with _single_threaded(len(group)) as workers, ThreadPoolExecutor(workers) as pool:
            for planned, (outcome, result, dense) in zip(group, pool.map(one, group), strict=True):
                outcomes[planned.name], packed[planned.name], weights[planned.name] = outcome, result, dense
                progress(len(packed))
    return HalfResult(packed, outcomes, tokens, original, weights, folded)


def stage_groups(spec: ModelSpec, stage: int, block: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """The solved tensors of a stage, in groups whose moments fit MOMENTS_BYTES together (a single one may exceed it).

    Moments of one stage do not depend on each other's solutions, so the split changes memory and nothing else. There
    is always one group, so that tokens are counted even where nothing is solved.
    """
    groups: list[list[PlannedTensor]] = [[]]
    sizes: dict[str, int] = {}
    members = [t for t in block if t.method is not None and stage_of(t.spec.input or "") == stage]
    for planned in sorted(members, key=lambda t: (t.spec.expert is not None, t.spec.expert or 0)):
        key, size = planned.spec.input or "", moments_bytes(spec, planned)
        if key not in sizes and groups[-1] and sum(sizes.values()) + size > MOMENTS_BYTES:
            groups.append([])
            sizes = {}
        sizes[key] = max(size, sizes.get(key, 0))
        groups[-1].append(planned)
    return groups


def statistics_of(planned: PlannedTensor, moments: Mapping[str, Moments]) -> Statistics | None:
    """What one tensor's method receives of a stage's moments; None for a tensor without inputs."""
    key = planned.spec.input
    own = moments.get(key) if key else None
    if own is None:
        return None
    strength = getattr(planned.method, "shrinkage", 0.0)
    if planned.spec.expert is None:
        return blend(own, None, 0.0)
    pool = moments.get("router") if key.endswith(".in") else moments.get(f"{key}.pool")
    return blend(own, pool, strength)


def wanted_moments(spec: ModelSpec, layer: int, stage: int, group: Sequence[PlannedTensor]) -> dict[str, Moments]:
    """Empty accumulators for a stage: the union of what its solvers need, shared where inputs are shared."""
    wanted: dict[str, Moments] = {}
    sparse = spec.is_sparse(layer)
    drifting = {t.spec.input for t in group if getattr(t.method, "drift", 0.0)}
    for planned in group:
        key, n = planned.spec.input, planned.spec.shape[-1]
        residual = spec.hidden_size if repairs_residual(spec, planned) else None
        if key is not None and key not in wanted:
            wanted[key] = Moments.zeros(n, drift=key in drifting, residual=residual)
        if planned.spec.expert is not None and stage == 2 and "router" not in wanted:
            wanted["router"] = Moments.zeros(n, drift=bool(drifting))
    if sparse and stage == 2:
        for e in range(spec.experts):  # tokens are counted even where nothing is solved
            wanted.setdefault(f"experts.{e}.in", Moments.zeros(0))
    return wanted


def collect(
    spec: ModelSpec,
    layer: int,
    stage: int,
    group: Sequence[PlannedTensor],
    original: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    streams: Streams,
    tokens: Sequence[int] = (),
) -> dict[str, Moments]:
    """Moments of every input that `stage` of a block needs, over all calibration windows.

    tokens: per expert, from the stage before; experts that saw fewer than `shrinkage * n` also get a pool.
    Raises NumericalError naming block, input and sample when activations are not finite.
    """
    wanted = wanted_moments(spec, layer, stage, group)
    if not wanted:
        return wanted
    pooled = _pools(stage, group, tokens, streams, wanted)
    experts = frozenset(t.spec.expert for t in group if t.spec.expert is not None)
    both = streams.original is not None and any(m.drift is not None or m.residual is not None for m in wanted.values())

    def observed(weights: Mapping[str, Tensor], hidden: Tensor, routing: Routing | None) -> tuple[dict, Routing | None]:
        seen: dict[str, tuple[Tensor, Tensor | None]] = {}

        def note(key: str, x: Tensor, gate: Tensor | None) -> None:
            if key in wanted:
                seen[key] = (x, gate)

        if stage in STAGES_OF["attention"]:
            forward_attention(spec, layer, weights, hidden, observe=note, until=stage)
            return seen, None
        routes: list[Routing] = []
        forward_ffn(
            spec,
            layer,
            weights,
            hidden,
            observe=note,
            until=stage,
            routing=routing,
            on_route=routes.append,
            pooled=pooled,
            experts=experts,
        )
        return seen, routes[0] if routes else None

    for start in range(0, streams.windows, streams.batch):
        stop = min(start + streams.batch, streams.windows)
        hidden = streams.compressed.read(start, stop)
        seen, routing = observed(weights, hidden, None)
        before: dict[str, tuple[Tensor, Tensor | None]] = {}
        lag = None
        if both:
            assert streams.original is not None
            reference = streams.original.read(start, stop)
            before, _ = observed(original, reference, routing)  # the same experts, so that inputs pair up
            lag = (reference - hidden).reshape(-1, spec.hidden_size)
        for key, (x, gate) in seen.items():
            moments = wanted[key]
            if not moments.gram.numel():
                moments.tokens += len(x)
                continue
            behind = None
            if lag is not None and moments.residual is not None:
                behind = lag[_rows_of(key, routing)] if routing is not None and key.startswith("experts.") else lag
            moments.add(x, before[key][0] if both else None, gate, behind)
    for key, moments in wanted.items():
        if not moments.finite:
            sample = _bad_sample(spec, layer, stage, original, weights, streams, key, pooled)
            raise NumericalError(
                f"activations at {key} of block {layer} are beyond what float32 sums can hold for "
                f"calibration sample {sample}; drop the sample or check the weights"
            )
    return wanted


def _pools(
    stage: int, group: Sequence[PlannedTensor], tokens: Sequence[int], streams: Streams, wanted: dict[str, Moments]
) -> Pooled | None:
    """Accumulators for the activations of cold experts under everybody's tokens (stage "ffn.act")."""
    if stage != 3 or not tokens:
        return None
    cold = {}
    for planned in group:
        if planned.spec.expert is not None:
            strength, n = getattr(planned.method, "shrinkage", 0.0), planned.spec.shape[-1]
            if tokens[planned.spec.expert] < max(strength * n, 1):  # one that saw nothing has nothing else
                cold[planned.spec.expert] = planned
    if not cold:
        return None
    for e, planned in cold.items():
        key, n = f"experts.{e}.act", planned.spec.shape[-1]
        wanted[f"{key}.pool"] = Moments.zeros(n, drift=wanted[key].drift is not None)
    total = streams.windows * streams.compressed.shape[1]
    widest = max(p.spec.shape[-1] for p in cold.values())
    return Pooled(frozenset(cold), max(1, total // (POOL_TOKENS_PER_COLUMN * widest)))


def _rows_of(key: str, routing: Routing) -> Tensor:
    """Positions of the tokens that an expert saw, in the order it saw them."""
    return (routing.experts == int(key.split(".")[1])).nonzero(as_tuple=True)[0]


def _bad_sample(
    spec: ModelSpec,
    layer: int,
    stage: int,
    original: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    streams: Streams,
    wanted: str,
    pooled: Pooled | None,
) -> int:
    """The calibration sample with the largest activations at `wanted` in either model, those not finite before all."""
    peaks = [0.0] * streams.windows
    for sample in range(streams.windows):

        def note(key: str, x: Tensor, gate: Tensor | None, sample: int = sample) -> None:
            if key == wanted and x.numel():
                peak = float(x.abs().max())  # NaN when there is one
                peaks[sample] = max(peaks[sample], peak if np.isfinite(peak) else np.inf)

        for stream, values in ((streams.compressed, weights), (streams.original, original)):
            if stream is None:
                continue
            hidden = stream.read(sample, sample + 1)
            if stage in STAGES_OF["attention"]:
                forward_attention(spec, layer, values, hidden, observe=note, until=stage)
            else:
                forward_ffn(spec, layer, values, hidden, observe=note, until=stage, pooled=pooled)
    return peaks.index(max(peaks))


def head_statistics(spec: ModelSpec, norm: Tensor, streams: Streams, drift: bool) -> Statistics:
    """Moments of what the language-model head sees: final hidden states after the last norm."""
    moments = Moments.zeros(spec.hidden_size, drift=drift and streams.original is not None)
    for start in range(0, streams.windows, streams.batch):
        stop = min(start + streams.batch, streams.windows)

        def states(stream: Activations, start: int = start, stop: int = stop) -> Tensor:
            return rms_norm(stream.read(start, stop), norm, spec.norm_eps).reshape(-1, spec.hidden_size)

        reference = states(streams.original) if moments.drift is not None and streams.original is not None else None
        moments.add(states(streams.compressed), reference)
    return blend(moments, None, 0.0)


def survey_head(spec: ModelSpec, load: Callable[[str], Tensor], ids: np.ndarray) -> Statistics:
    """Moments of what the original model's head sees on some windows of text, one block in memory at a time.

    load(name) gives a checkpoint tensor; ids: [windows, length].
    """
    moments = Moments.zeros(spec.hidden_size)
    for states in StreamedSource(spec, load, "original").final_states(list(ids)):
        moments.add(states)
    return blend(moments, None, 0.0)
