"""Routed and shared experts, see `layers.moe`."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.models.forward.base import Named, Routing, Taps
from compress.models.forward.mlp import activations
from compress.models.layers.moe import MoE, Router
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, MoE)
    rows = x.flatten(0, -2)
    taps.see("router", rows)
    routing = taps.routing or choose(layer, weights, rows)
    if taps.on_route is not None:
        taps.on_route(routing)
    out = routed(layer, weights, rows, routing, taps)
    if layer.shared:
        taps.see("shared.in", rows)
        if not taps.end(0):
            act = activations(layer.beside(layer.shared), weights, rows)
            taps.see("shared.act", act)
            if not taps.end(1):
                shared = weights.linear(layer.shared.prefix + layer.shared.leaves[-1], act)
                if layer.shared.gate:
                    shared = torch.sigmoid(rows @ weights[layer.shared.gate].T) * shared
                out += shared
    return None if taps.until is not None else out.view_as(x)


def routed(layer: MoE, weights: Named, x: Tensor, routing: Routing, taps: Taps) -> Tensor:
    """The weighted sum of the chosen experts. x: [tokens, hidden]."""
    out = torch.zeros_like(x)
    for e in range(layer.experts):
        if taps.until == 1 and taps.experts is not None and e not in taps.experts:
            continue
        parts = layer.routed(e)
        if taps.pooled is not None and e in taps.pooled.experts:
            some = x[:: taps.pooled.stride]
            taps.see(f"experts.{e}.act.pool", activations(parts, weights, some, _at_input(layer, weights, some, e)))
        tokens, slot = (routing.experts == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate, rows = routing.weights[tokens, slot], x[tokens]
        taps.see(f"experts.{e}.in", rows, gate)
        if taps.end(0):
            continue
        before = None
        if layer.router.at_input:  # W (g x) is g (W x); what comes out counts as it is
            before, gate = gate[:, None], torch.ones_like(gate)
        act = activations(parts, weights, rows, before)
        taps.see(f"experts.{e}.act", act, gate)
        if taps.end(1):
            continue
        out.index_add_(0, tokens, weights.linear(parts.prefix + parts.leaves[-1], act) * gate[:, None])
    return out


def _at_input(layer: MoE, weights: Named, x: Tensor, e: int) -> Tensor | None:
    """What an expert's inputs are multiplied by, of tokens whether they chose it or not: float32 [tokens, 1], or None."""
    if not layer.router.at_input:
        return None
    return scores(layer.router, weights.linear(layer.router.name.removesuffix(".weight"), x))[:, e, None]


def choose(layer: MoE, weights: Named, x: Tensor) -> Routing:
    """The router's choice. x: [tokens, hidden]."""
    correction = weights[layer.router.correction] if layer.router.correction else None
    return route(layer.router, weights.linear(layer.router.name.removesuffix(".weight"), x), correction)


def scores(router: Router, logits: Tensor) -> Tensor:
    """Of all experts, float32."""
    return logits.float().sigmoid() if router.score == "sigmoid" else logits.float().softmax(-1)


def route(router: Router, logits: Tensor, correction: Tensor | None = None) -> Routing:
    """Scores, top-k (of the best groups), renormalised and scaled where the model does. logits: [tokens, experts]."""
    found = scores(router, logits)
    ranked = found if correction is None else found + correction.flatten()
    if router.groups > 1:
        ranked = _in_best_groups(router, ranked)
    if ranked is found:
        weights, experts = found.topk(router.k, dim=-1)
    else:
        experts = ranked.topk(router.k, dim=-1).indices
        weights = found.gather(-1, experts)
    if router.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights if router.scale == 1.0 else weights * router.scale)


def _in_best_groups(router: Router, scores: Tensor) -> Tensor:
    """Scores with those of experts outside the best groups out of reach (DeepSeek-V2, arXiv 2405.04434; V3, 2412.19437)."""
    groups = scores.unflatten(-1, (router.groups, -1))
    worth = groups.amax(-1) if router.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
    best = worth.topk(router.top_groups, dim=-1).indices
    open_groups = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
    return groups.masked_fill(~open_groups[..., None], float("-inf")).flatten(-2)
