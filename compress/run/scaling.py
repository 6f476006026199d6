"""Scalings before the solve (AWQ, SmoothQuant): a sub-layer becomes an equivalent one that is easier to round.

Scales are searched on what its linears see in the compressed model, against plain rounding by each tensor's own codec,
and folded into the norms and linears that come before. The sub-layer computes what it did, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.codecs.names import codec_info
from compress.errors import NumericalError
from compress.limits import MOMENTS_BYTES
from compress.models.forward import Taps, forward_branch
from compress.models.spec import Branch
from compress.solve.tensor import solve_tensor
from compress.solvers.options import RtnOptions
from compress.statistics import Moments, Statistics
from compress.streaming.walk import Streams
from compress.transforms.base import Fold, apply, folds
from compress.transforms.options import TransformOptions

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor


@dataclass(frozen=True)
class Folded:
    """One scaling: where, by which transform, and the rounding error it was chosen for, before and after."""

    input: str
    transform: str
    before: float
    after: float


def scale_sublayer(
    branch: Branch,
    tensors: Sequence[PlannedTensor],
    weights: Mapping[str, Tensor],
    streams: Streams,
    transforms: Sequence[TransformOptions],
) -> tuple[dict[str, Tensor], tuple[Folded, ...]]:
    """Equivalent float32 weights of a sub-layer, by checkpoint name, and what was done.

    Raises NumericalError when the activations are not finite.
    """
    planned = {t.name: t for t in tensors}
    out, done = dict(weights), []

    def rounded(name: str, weight: Tensor, importance: Tensor) -> Tensor:
        return _rounded(planned[name], weight, importance)

    for options in transforms:
        places = [
            fold
            for fold in folds(branch)
            if fold.place in options.fold and any(planned[name].method is not None for name in fold.consumers)
        ]
        for group in _groups(places):
            moments = _observe(branch, out, streams, {fold.input: fold.channels for fold in group})
            for fold in group:
                seen = moments[fold.input]
                if not seen.tokens:
                    continue  # an expert that no token reached
                scale, before, after = options.implementation.search(fold, out, seen, rounded, options)
                out |= apply(out, fold, scale)
                done.append(Folded(fold.input, options.name, before, after))
    return out, tuple(done)


def _groups(places: Sequence[Fold]) -> Iterator[list[Fold]]:
    """Folds whose moments fit into MOMENTS_BYTES together; one may exceed it. What another group folded changes its
    own inputs only, so that the split costs a pass over the text and changes nothing else."""
    group: list[Fold] = []
    for fold in places:
        if group and 4 * sum(f.channels**2 for f in (*group, fold)) > MOMENTS_BYTES:
            yield group
            group = []
        group.append(fold)
    if group:
        yield group


def _rounded(planned: PlannedTensor, weight: Tensor, importance: Tensor) -> Tensor:
    """Some rows of the weight as plain rounding would leave them, themselves where nothing is quantized.

    A trellis is judged by the lattice of its bits, which is far quicker to search: a scale serves the space that both
    code, not the code.
    """
    if planned.solver is None:
        return weight
    planned = planned.plain
    info = codec_info(planned.codec)
    codec = f"e8p{info.bits}".removesuffix("2") if info.kind == "vector" else planned.codec
    plain = replace(planned, codec=codec, solver=RtnOptions())
    return solve_tensor(plain, weight, Statistics(torch.diag(importance), None, None, 1)).dense()


def _observe(
    branch: Branch, weights: Mapping[str, Tensor], streams: Streams, widths: Mapping[str, int]
) -> dict[str, Moments]:
    """Moments and magnitudes of inputs, by key, over all calibration windows of the compressed stream."""
    device = next(iter(weights.values())).device
    moments = {key: Moments.zeros(n, magnitudes=True, device=device) for key, n in widths.items()}

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        if key in moments:
            moments[key].add(x, None, gate)

    taps = Taps(note, max((branch.inputs[key].stage for key in widths), default=None))
    for start, stop in streams.compressed.batches if widths else ():
        forward_branch(branch, weights, streams.compressed.read(start, stop), taps)
    for key, seen in moments.items():
        if not seen.finite:
            raise NumericalError(f"activations at {key} of block {branch.layer} are not finite; check the checkpoint")
    return moments
