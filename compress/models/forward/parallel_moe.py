"""Routed experts beside a dense feed-forward, see `layers.parallel_moe`."""

from __future__ import annotations

from torch import Tensor

from compress.models.forward import moe
from compress.models.forward.base import Named, Routing, Taps, rms_norm
from compress.models.forward.mlp import activations
from compress.models.layers.parallel_moe import ParallelMoE
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], the stream as it is -> what is added to it before the norm behind both, or None."""
    layer, eps = branch.sublayer, branch.spec.norm_eps
    assert isinstance(layer, ParallelMoE)
    assert layer.shared is not None
    rows = x.flatten(0, -2)

    def normed(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, weights[f"{name}.weight"], eps)

    asked = rms_norm(rows, weights[layer.scale], eps) * layer.hidden**-0.5
    taps.see("router", asked)
    routing = taps.routing or _chosen(layer, weights, asked)
    if taps.on_route is not None:
        taps.on_route(routing)
    inputs, beside = (normed(rows, norm) for norm, _ in layer.pre)
    taps.see("routed.in", beside)
    routed = moe.routed(layer, weights, beside, routing, taps)
    taps.see("shared.in", inputs)
    if taps.end(0):
        return None
    act = activations(layer.beside(layer.shared), weights, inputs)
    taps.see("shared.act", act)
    if taps.end(1):
        return None
    dense = weights.linear(layer.shared.prefix + layer.shared.leaves[-1], act)
    both = (normed(part, norm) for part, (norm, _) in zip((dense, routed), layer.behind, strict=True))
    return next(both).add(next(both)).view_as(x)


def _chosen(layer: ParallelMoE, weights: Named, x: Tensor) -> Routing:
    """The router's choice, times the chosen experts' own factors."""
    found = moe.choose(layer, weights, x)
    return Routing(found.experts, found.weights * weights[layer.each][found.experts])
