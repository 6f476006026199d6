"""Scalings before the solve: half a block becomes an equivalent half that is easier to round.

Scales are searched on what the half's linears see in the compressed model, against plain rounding by each tensor's own
codec, and folded into the norms and linears that come before. The half computes what it did, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.errors import NumericalError
from compress.models.base import ModelSpec
from compress.models.decoder import STAGES, forward_attention, forward_ffn, stage_of
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.statistics import Moments
from compress.transforms.base import Fold, apply, folds
from compress.transforms.options import TransformOptions

if TYPE_CHECKING:
    from compress.plan import PlannedTensor
    from compress.stream import Streams


@dataclass(frozen=True)
class Folded:
    """One scaling: where, by which transform, and the rounding error it was chosen for, before and after."""

    input: str
    transform: str
    before: float
    after: float


def prepare_half(
    spec: ModelSpec,
    layer: int,
    half: str,
    block: Sequence[PlannedTensor],
    weights: Mapping[str, Tensor],
    streams: Streams,
    transforms: Sequence[TransformOptions],
) -> tuple[dict[str, Tensor], tuple[Folded, ...]]:
    """Equivalent float32 weights of half a block, by checkpoint name, and what was done.

    Raises NumericalError when the activations are not finite.
    """
    planned = {t.name: t for t in block}
    out, done = dict(weights), []
    for options in transforms:
        module = import_module(f"compress.transforms.{options.name}")
        places = [
            fold
            for fold in folds(spec, layer, out)
            if _half_of(fold) == half
            and STAGES[stage_of(fold.input)] in options.fold
            and any(planned[name].solver is not None for name in fold.consumers)
        ]
        moments = _observe(spec, layer, half, out, streams, {fold.input: fold.channels for fold in places})
        for fold in places:
            seen = moments[fold.input]
            if not seen.tokens:
                continue  # an expert that no token reached

            def rounded(name: str, weight: Tensor, importance: Tensor) -> Tensor:
                return _rounded(planned[name], weight, importance)

            scale, before, after = module.search(fold, out, seen, rounded, options)
            out |= apply(out, fold, scale)
            done.append(Folded(fold.input, options.name, before, after))
    return out, tuple(done)


def _half_of(fold: Fold) -> str:
    return "attention" if stage_of(fold.input) < STAGES.index("ffn.in") else "ffn"


def _rounded(planned: PlannedTensor, weight: Tensor, importance: Tensor) -> Tensor:
    """The weight as plain rounding would leave it, itself where nothing is quantized."""
    if planned.solver is None:
        return weight
    codec = block_codec(planned.codec, weight.shape[1])
    return rtn.solve(weight, torch.diag(importance), codec, RtnOptions()).decode()


def _observe(
    spec: ModelSpec,
    layer: int,
    half: str,
    weights: Mapping[str, Tensor],
    streams: Streams,
    widths: Mapping[str, int],
) -> dict[str, Moments]:
    """Moments and magnitudes of inputs, by key, over all calibration windows of the compressed stream."""
    moments = {key: Moments.zeros(n, magnitudes=True) for key, n in widths.items()}

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        if key in moments:
            moments[key].add(x, None, gate)

    forward = forward_attention if half == "attention" else forward_ffn
    last = max((stage_of(key) for key in widths), default=None)
    for start in range(0, streams.windows if widths else 0, streams.batch):
        hidden = streams.compressed.read(start, min(start + streams.batch, streams.windows))
        forward(spec, layer, weights, hidden, observe=note, until=last)
    for key, seen in moments.items():
        if not seen.finite:
            raise NumericalError(f"activations at {key} of block {layer} are not finite; check the checkpoint")
    return moments
