"""From scores to what every layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.codecs.base import TINY
from compress.models.spec import ModelSpec
from compress.structured.options import PruneExpertsOptions
from compress.structured.scores import best
from compress.structured.shapes import Cuts, Reduction, candidates
from compress.structured.survey import LayerScores
from compress.structured.view import KeptLayer


def decide(spec: ModelSpec, scores: Sequence[LayerScores], cuts: Cuts) -> tuple[Reduction, tuple[KeptLayer, ...]]:
    """The shape that is left, and what each of its layers keeps. scores: one a layer of `spec`, the original."""
    shapes = cuts.shapes or candidates(spec, cuts.drop, cuts.experts, cuts.structured)
    reduction = shapes[0]  # all drop as many layers and experts
    influence = torch.tensor([s.influence for s in scores], dtype=torch.float64)
    layers = best(influence, spec.layers - reduction.dropped)
    chosen = [_experts(spec, n, scores[n], cuts.experts, reduction) for n in layers]
    if cuts.structured is None:
        groups = tuple(range(spec.kv_heads))
        return reduction, tuple(KeptLayer(n, kept, groups) for n, kept in zip(layers, chosen, strict=True))
    left, heads_go = [scores[n] for n in layers], not spec.family.fixed_heads
    reduction = min(shapes, key=lambda shape: split_loss(left, chosen, shape))
    return reduction, tuple(
        KeptLayer(
            n,
            kept,
            best(scores[n].heads, reduction.kv_heads)
            if heads_go and len(scores[n].heads)
            else tuple(range(spec.kv_heads)),
            {
                name: torch.tensor(best(values, _width(name, reduction)))
                for name, values in _channels(scores[n], kept).items()
            },
        )
        for n, kept in zip(layers, chosen, strict=True)
    )


def _experts(
    spec: ModelSpec, layer: int, scores: LayerScores, experts: PruneExpertsOptions | None, reduction: Reduction
) -> tuple[int, ...]:
    if not spec.is_sparse(layer):
        return ()
    by_gain = experts is not None and experts.method == "reap"
    return best(scores.saliency if by_gain else scores.frequency, reduction.experts)


def _width(name: str, reduction: Reduction) -> int:
    """Channels that a feed-forward keeps."""
    return {"mlp": reduction.intermediate, "shared": reduction.shared_intermediate}.get(
        name, reduction.moe_intermediate
    )


def _channels(scores: LayerScores, experts: Sequence[int]) -> dict[str, Tensor]:
    """Channel scores of the feed-forwards that stay."""
    routed = {f"experts.{e}" for e in experts}
    return {name: v for name, v in scores.channels.items() if name in routed or not name.startswith("experts.")}


def split_loss(scores: Sequence[LayerScores], chosen: Sequence[Sequence[int]], reduction: Reduction) -> float:
    """Share of its fluctuation that a layer loses on average in a model of this shape.

    scores: of the layers that stay; chosen: their experts. Heads and channels compete as what they are: squared errors
    that their loss adds to the same residual stream.
    """
    losses = []
    for own, experts in zip(scores, chosen, strict=True):
        parts = [(own.heads, reduction.kv_heads)]
        parts += [(values, _width(name, reduction)) for name, values in _channels(own, experts).items()]
        total = sum(float(values.sum()) for values, _ in parts)
        lost = sum(float(values.sort().values[: len(values) - kept].sum()) for values, kept in parts)
        losses.append(lost / max(total, TINY))
    return sum(losses) / len(losses)
