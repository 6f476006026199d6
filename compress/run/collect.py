"""Second moments of what linears multiply, over all calibration text, in the compressed model and against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.limits import MOMENTS_BYTES
from compress.models.forward import Observer, Pooled, Routing, Taps, forward_branch
from compress.models.layers.base import Input
from compress.models.spec import Branch
from compress.plan.tensor import PlannedTensor, moments_bytes, repairs_residual
from compress.statistics import Moments, Statistics, blend
from compress.streaming.walk import Streams

POOL_TOKENS_PER_COLUMN = 8  # tokens that a cold expert's pool holds, per input column


@dataclass
class Site:
    """One sub-layer at work: the activations in front of it, and its weights before and those that inputs are observed with, by
    checkpoint name.

    squares: every input's are summed, too; tokens: of the calibration text that each routed expert saw, once they are
    counted.
    """

    branch: Branch
    streams: Streams
    original: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    squares: bool = False
    tokens: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(iter(self.weights.values())).device


@dataclass(frozen=True)
class Wanted:
    """What one pass over the text gathers: accumulators by key, of inputs that become known at `stage`.

    pooled: cold experts that see other tokens, too; experts: those whose activations are wanted.
    """

    stage: int
    moments: dict[str, Moments]
    pooled: Pooled | None = None
    experts: frozenset[int] = field(default=frozenset())


def stage_groups(branch: Branch, stage: int, tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """The solved tensors of a stage, in groups whose moments fit MOMENTS_BYTES together (a single one may exceed it).

    Moments of one stage do not depend on each other's solutions, so the split changes memory and nothing else. There
    is always one group, so that tokens are counted even where nothing is solved.
    """
    groups: list[list[PlannedTensor]] = [[]]
    sizes: dict[str, int] = {}
    inputs = branch.inputs
    members = [t for t in tensors if t.method is not None and t.spec.input and inputs[t.spec.input].stage == stage]
    for planned in sorted(members, key=lambda t: (t.spec.expert is not None, t.spec.expert or 0)):
        key, size = planned.spec.input or "", moments_bytes(branch.spec, planned)
        if key not in sizes and groups[-1] and sum(sizes.values()) + size > MOMENTS_BYTES:
            groups.append([])
            sizes = {}
        sizes[key] = max(size, sizes.get(key, 0))
        groups[-1].append(planned)
    return groups


def statistics_of(branch: Branch, planned: PlannedTensor, moments: Mapping[str, Moments]) -> Statistics | None:
    """What one tensor's method receives of a stage's moments; None for a tensor without inputs."""
    own = moments.get(planned.spec.input or "")
    if own is None:
        return None
    pool = branch.inputs[planned.spec.input or ""].pool
    if pool is None:
        return blend(own, None, 0.0)
    return blend(own, moments.get(pool), planned.asks.shrinkage)


def wanted_moments(site: Site, stage: int, group: Sequence[PlannedTensor]) -> dict[str, Moments]:
    """Empty accumulators for a stage: the union of what its solvers need, shared where inputs are shared."""
    wanted: dict[str, Moments] = {}
    spec, inputs, device = site.branch.spec, site.branch.inputs, site.device
    both = site.streams.original is not None
    drifting = {t.spec.input for t in group if t.asks.drift and both}
    for planned in group:
        key, n = planned.spec.input, planned.spec.shape[-1]
        if key is None:
            continue
        residual = spec.hidden_size if both and repairs_residual(planned) else None
        if key not in wanted:
            wanted[key] = Moments.zeros(
                n, drift=key in drifting, residual=residual, squares=site.squares, device=device
            )
        pool = inputs[key].pool
        if pool is not None and pool in inputs and pool not in wanted:
            wanted[pool] = Moments.zeros(n, drift=bool(drifting), device=device)
    for key, given in inputs.items():
        if given.counts and given.stage == stage:  # tokens are counted even where nothing is solved
            wanted.setdefault(key, Moments.zeros(0, device=device))
    return wanted


def counted(branch: Branch, stage: int, moments: Mapping[str, Moments]) -> tuple[int, ...]:
    """Tokens that each routed expert saw, where this stage counts them."""
    keys = [i.key for i in branch.inputs.values() if i.counts and i.stage == stage]
    return tuple(moments[key].tokens for key in keys)


def collect(
    site: Site, stage: int, group: Sequence[PlannedTensor], progress: Callable[[float], None] = lambda done: None
) -> dict[str, Moments]:
    """Moments of every input that `stage` of a sub-layer needs, over all calibration windows; progress receives the share of
    these that is done.

    Experts that saw fewer than `shrinkage * n` tokens, as far as those are counted, also get a pool.
    Raises NumericalError naming block, input and sample when activations are not finite.
    """
    moments = wanted_moments(site, stage, group)
    if not moments:
        return moments
    pooled = _pools(site, stage, group, moments)
    experts = frozenset(t.spec.expert for t in group if t.spec.expert is not None)
    wanted = Wanted(stage, moments, pooled, experts)
    both = site.streams.original is not None and any(
        m.drift is not None or m.residual is not None for m in moments.values()
    )
    for start, stop in site.streams.compressed.batches:
        _gather(site, wanted, start, stop, both)
        progress(stop / site.streams.windows)
    for key, sums in moments.items():
        if not sums.finite:
            raise NumericalError(
                f"activations at {key} of block {site.branch.layer} are beyond what float32 sums can hold for "
                f"calibration sample {_bad_sample(site, wanted, key)}; drop the sample or check the weights"
            )
    return moments


def _gather(site: Site, wanted: Wanted, start: int, stop: int, both: bool) -> None:
    """Add some windows to the moments. both: the original's activations are compared."""
    hidden = site.streams.compressed.read(start, stop)
    seen, routing = _observed(site.branch, site.weights, hidden, wanted, None)
    before: dict[str, tuple[Tensor, Tensor | None]] = {}
    lag = None
    if both:
        assert site.streams.original is not None
        reference = site.streams.original.read(start, stop)
        before, _ = _observed(
            site.branch, site.original, reference, wanted, routing
        )  # the same experts: inputs pair up
        lag = (reference - hidden).reshape(-1, hidden.shape[-1]) / site.branch.sublayer.residual
    for key, (x, gate) in seen.items():
        moments = wanted.moments[key]
        if not moments.gram.numel():
            moments.tokens += len(x)
            continue
        behind = None
        if lag is not None and moments.residual is not None:
            behind = rows_of(lag, site.branch.inputs[key], routing)
        moments.add(x, before[key][0] if both else None, gate, behind)


def _observed(
    branch: Branch, weights: Mapping[str, Tensor], hidden: Tensor, wanted: Wanted, routing: Routing | None
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], Routing | None]:
    """Wanted inputs with their routing weights, and the routing that was used."""
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}
    routes: list[Routing] = []

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        if key in wanted.moments:
            seen[key] = (x, gate)

    taps = Taps(note, wanted.stage, routing, routes.append, wanted.pooled, wanted.experts)
    forward_branch(branch, weights, hidden, taps)
    return seen, routes[0] if routes else None


def _pools(site: Site, stage: int, group: Sequence[PlannedTensor], moments: dict[str, Moments]) -> Pooled | None:
    """Accumulators for the activations of cold experts under everybody's tokens, where their inputs have such a pool."""
    if not site.tokens:
        return None
    inputs, cold = site.branch.inputs, {}
    for planned in group:
        given = inputs[planned.spec.input or ""]
        if given.expert is not None and given.pool not in inputs:
            n = planned.spec.shape[-1]
            if site.tokens[given.expert] < max(planned.asks.shrinkage * n, 1):  # one that saw nothing has nothing else
                cold[given.expert] = given
    if not cold:
        return None
    for given in cold.values():
        drift = moments[given.key].drift is not None
        moments[given.pool or ""] = Moments.zeros(given.width, drift=drift, device=site.device)
    total = site.streams.windows * site.streams.compressed.shape[1]
    widest = max(given.width for given in cold.values())
    return Pooled(frozenset(cold), max(1, total // (POOL_TOKENS_PER_COLUMN * widest)))


def rows_of(values: Tensor, given: Input, routing: Routing | None) -> Tensor:
    """Of values a token, those of the tokens that an input has, in its order: all, or those that its expert saw."""
    if given.expert is None or routing is None:
        return values
    return values[(routing.experts == given.expert).nonzero(as_tuple=True)[0]]


def _bad_sample(site: Site, wanted: Wanted, key: str) -> int:
    """The calibration sample with the largest activations at `key` in either model, those not finite before all."""
    peaks = [0.0] * site.streams.windows
    for sample in range(site.streams.windows):

        def note(seen: str, x: Tensor, gate: Tensor | None, sample: int = sample) -> None:
            if seen == key and x.numel():
                peak = float(x.abs().max())  # NaN when there is one
                peaks[sample] = max(peaks[sample], peak if np.isfinite(peak) else np.inf)

        observe: Observer = note
        for stream, weights in ((site.streams.compressed, site.weights), (site.streams.original, site.original)):
            if stream is not None:
                taps = Taps(observe, wanted.stage, pooled=wanted.pooled)
                forward_branch(site.branch, weights, stream.read(sample, sample + 1), taps)
    return peaks.index(max(peaks))
