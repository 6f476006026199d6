"""What stays learns to make up for what went: least squares on o_proj and down_proj, half a block after the other.

Both models run side by side over the calibration windows. Behind each half of a kept layer, with x the input of its
last linear in the reduced model and e what the reduced residual stream then misses of the original's,

    W' = W + t (sum e x^T) (sum x x^T + ridge)^-1

The sums run over most windows; t, between 0 and 1, is what serves the others best, so that little text changes little.
This is the reconstruction of pruned layers (OSSCAR, arXiv 2403.12983; ZipLM, arXiv 2302.04089) with the whole lag of the
stream as its target. The feed-forward's target is the original's stream where the next kept layer begins: before a
gap, down_proj also learns what the dropped layers did (ReplaceMe, arXiv 2505.02819).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.codecs.base import TINY
from compress.limits import MOMENTS_BYTES
from compress.models.forward import NO_TAPS, Routing, Taps, forward_branch
from compress.models.spec import Branch
from compress.statistics import Moments, blend, corrected_target
from compress.streaming.activations import Activations
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Scratch, Stream, walk
from compress.structured.view import StructureView
from compress.weights import Loader

HELD_OUT = 8  # every eighth window
ROUNDING = 1e-12  # squared distances below it, over the squared norm, are float32 sums in another order


@dataclass(frozen=True, eq=False)
class Repair:
    """tensors: new float32 values by name, none where nothing could be gained; before, after: squared distance of the
    reduced residual stream to the original's on the held-out windows, over the squared norm of the latter."""

    tensors: Mapping[str, Tensor]
    before: float
    after: float

    @property
    def report(self) -> dict[str, float | bool]:
        return {"before": self.before, "after": self.after, "kept": bool(self.tensors)}


def repair_model(
    view: StructureView,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    damping: float,
    progress: Callable[[float], None] = lambda fraction: None,
    placement: Placement = CPU,
) -> tuple[dict[str, Tensor], list[dict[str, Repair]]]:
    """Repair every sub-layer of the model that `view` shows, each on top of those before it.

    load(name) gives the original's tensors; ids: [windows, length]; scratch(name): activation files of the ids' shape,
    deleted when done. Returns new tensors by name, in the float type of those they replace, and what happened, one
    entry a layer. One block of each model is in memory at a time. Raises NumericalError for activations that are not finite.
    """
    original = Stream(view.original, load, ids, scratch, "original", placement)
    reduced = Stream(view.spec, lambda name: view.load(name, load), ids, scratch, "reduced", placement)
    tensors: dict[str, Tensor] = {}
    repairs: list[dict[str, Repair]] = []
    ends = [kept.layer for kept in view.kept[1:]] + [view.original.layers]
    original.skip(range(view.kept[0].layer))
    for block in walk(view.spec, reduced.load, placement):
        kept, end = view.kept[block.layer], ends[block.layer]
        repairs.append({})
        for branch, above in zip(block.branches, view.original.branches(kept.layer), strict=True):
            original.advance(above)
            if branch.last:
                original.skip(range(kept.layer + 1, end))
            stored = {t.name: reduced.load(t.name) for t in branch.tensors}
            dtypes = {name: values.dtype for name, values in stored.items()}
            weights = {name: placement.weight(values) for name, values in stored.items()}
            repair = repair_sublayer(Broken(branch, weights, reduced.at, original.at), damping, dtypes)
            repairs[-1][branch.sublayer.half] = repair
            tensors |= {name: values.to(dtypes[name]).cpu() for name, values in repair.tensors.items()}
            reduced.advance(branch, {**weights, **repair.tensors})
        progress((block.layer + 1) / len(view.kept))
    original.at.delete()
    reduced.at.delete()
    return tensors, repairs


@dataclass(frozen=True)
class Broken:
    """A sub-layer of a reduced model. weights: float32 by name; source: the reduced model's stream at its input; target: the
    original's where its output should be."""

    branch: Branch
    weights: Mapping[str, Tensor]
    source: Activations
    target: Activations

    def batches(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Numbers of some windows and what both streams hold of them."""
        for start, stop in self.source.batches:
            yield range(start, stop), self.source.read(start, stop), self.target.read(start, stop)

    def run(self, hidden: Tensor, taps: Taps = NO_TAPS, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Its output, with other weights where these are given."""
        out = forward_branch(self.branch, weights or self.weights, hidden, taps)
        assert out is not None
        return out

    def distance(self, weights: Mapping[str, Tensor] | None = None) -> float:
        """Squared distance of its output to what it should be, over the squared norm of that, on the held-out windows."""
        missed = total = 0.0
        for windows, hidden, wanted in self.batches():
            held = [i for i, n in enumerate(windows) if _is_held_out(n, self.source)]
            if held:
                out = self.run(hidden[held], weights=weights)
                missed += float((out - wanted[held]).square().sum(dtype=torch.float64))
                total += float(wanted[held].square().sum(dtype=torch.float64))
        return missed / max(total, TINY)


def repairable(branch: Branch) -> list[str]:
    """The tensors of a sub-layer whose update stands for all that it adds to the residual stream."""
    return [t.name for t in branch.tensors if t.declared.alone]


def repair_sublayer(broken: Broken, damping: float, dtypes: Mapping[str, torch.dtype] | None = None) -> Repair:
    """Least squares on the last linears of a sub-layer of the reduced model.

    damping: ridge as a fraction of the mean diagonal; dtypes: float types that the new values are rounded to, by name.
    Nothing is kept that brings the stream no nearer on the held-out windows; a single window leaves none to hold out.
    """
    names, weights = repairable(broken.branch), broken.weights
    before = after = broken.distance()
    updated: dict[str, Tensor] = {}
    if names and before > ROUNDING:
        for group in _groups(broken, names):
            for name, update in _updates(broken, damping, group).items():
                values = (weights[name] + update).to((dtypes or {}).get(name)).float()
                if not torch.equal(values, weights[name]):
                    updated[name] = values
    if updated:
        after = broken.distance({**weights, **updated})
    return Repair(updated, before, after) if after < before else Repair({}, before, before)


def _updates(broken: Broken, damping: float, names: Sequence[str]) -> dict[str, Tensor]:
    """What to add to some tensors of a sub-layer, whose moments are held at once."""
    inputs = {t.input: t for t in broken.branch.tensors if t.name in names}
    width = broken.branch.spec.hidden_size
    fitted, judged = (
        {
            key: Moments.zeros(t.shape[1], residual=width, device=broken.weights[t.name].device)
            for key, t in inputs.items()
        }
        for _ in range(2)
    )
    for windows, hidden, wanted in broken.batches():
        seen: dict[str, tuple[Tensor, Tensor | None]] = {}
        routes: list[Routing] = []

        def note(key: str, x: Tensor, gate: Tensor | None, to: dict = seen) -> None:
            to[key] = (x, gate)

        out = broken.run(hidden, Taps(note, on_route=routes.append))
        lag = (wanted - out).flatten(0, 1) / broken.branch.sublayer.residual
        held = torch.tensor([_is_held_out(n, broken.source) for n in windows], device=lag.device)
        held = held.repeat_interleave(hidden.shape[1])
        for key in seen.keys() & inputs.keys():
            (x, gate), expert = seen[key], inputs[key].expert
            rows = torch.arange(len(lag), device=lag.device)
            if expert is not None:
                rows = (routes[0].experts == expert).nonzero(as_tuple=True)[0]
            for moments, chosen in ((fitted, ~held[rows]), (judged, held[rows])):
                moments[key].add(x[chosen], gate=None if gate is None else gate[chosen], lag=lag[rows[chosen]])
    return {
        t.name: least_squares_update(fitted[key], judged[key], damping, cold=t.expert is not None)
        for key, t in inputs.items()
    }


def least_squares_update(fitted: Moments, judged: Moments, damping: float, *, cold: bool = False) -> Tensor:
    """What to add to a weight so that it gives, from its inputs, what the stream misses: t R (G + ridge)^-1.

    fitted: G = sum x x^T [n, n] and R = sum e x^T [m, n], both with the gate squared; judged: the same of tokens held out,
    whose squared error t in [0, 1] minimises; damping: ridge as a fraction of G's mean diagonal. cold: the ridge also
    stands for n tokens of white input that ask for nothing, so that an expert of few tokens changes little. float32 [m, n];
    zeros where either saw nothing.
    """
    assert fitted.residual is not None and judged.residual is not None
    nothing = torch.zeros_like(fitted.residual)
    if not fitted.tokens or not judged.tokens:
        return nothing
    ridge = damping + (len(fitted.gram) / fitted.tokens if cold else 0.0)
    update = corrected_target(nothing, blend(fitted, None, 0.0), ridge, 0.0, 1.0)
    gain, cost = (update * judged.residual).sum(), ((update @ judged.gram) * update).sum()
    return update * (gain / cost.clamp_min(TINY)).clamp(0.0, 1.0)


def _is_held_out(window: int, stream: Activations) -> bool:
    """Every eighth window, the last of fewer, none of one."""
    every = min(HELD_OUT, stream.shape[0])
    return every > 1 and window % every == every - 1


def _groups(broken: Broken, names: Sequence[str]) -> list[list[str]]:
    """Tensors whose moments fit MOMENTS_BYTES together, or one that does not."""
    columns = max(broken.weights[name].shape[1] for name in names)
    size = max(1, MOMENTS_BYTES // (8 * columns * (columns + broken.branch.spec.hidden_size)))
    return [list(names[start : start + size]) for start in range(0, len(names), size)]
