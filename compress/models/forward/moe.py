"""Routed and shared experts, see `layers.moe`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Routing, Taps
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
    out = _routed(layer, weights, rows, routing, taps)
    if layer.shared:
        taps.see("shared.in", rows)
        if not taps.end(0):
            prefix = layer.shared.prefix
            act = F.silu(rows @ weights[f"{prefix}gate_proj.weight"].T) * (rows @ weights[f"{prefix}up_proj.weight"].T)
            taps.see("shared.act", act)
            if not taps.end(1):
                shared = act @ weights[f"{prefix}down_proj.weight"].T
                if layer.shared.gate:
                    shared = torch.sigmoid(rows @ weights[layer.shared.gate].T) * shared
                out += shared
    return None if taps.until is not None else out.view_as(x)


def _routed(layer: MoE, weights: Named, x: Tensor, routing: Routing, taps: Taps) -> Tensor:
    """The weighted sum of the chosen experts. x: [tokens, hidden]."""
    gate, up, down = layer.leaves
    out = torch.zeros_like(x)

    def activate(prefix: str, rows: Tensor) -> Tensor:
        return F.silu(rows @ weights[f"{prefix}{gate}.weight"].T) * (rows @ weights[f"{prefix}{up}.weight"].T)

    for e in range(layer.experts):
        if taps.until == 1 and taps.experts is not None and e not in taps.experts:
            continue
        prefix = layer.expert.format(e=e)
        if taps.pooled is not None and e in taps.pooled.experts:
            taps.see(f"experts.{e}.act.pool", activate(prefix, x[:: taps.pooled.stride]))
        tokens, slot = (routing.experts == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate_weight = routing.weights[tokens, slot]
        rows = x[tokens]
        taps.see(f"experts.{e}.in", rows, gate_weight)
        if taps.end(0):
            continue
        act = activate(prefix, rows)
        taps.see(f"experts.{e}.act", act, gate_weight)
        if taps.end(1):
            continue
        out.index_add_(0, tokens, (act @ weights[f"{prefix}{down}.weight"].T) * gate_weight[:, None])
    return out


def choose(layer: MoE, weights: Named, x: Tensor) -> Routing:
    """The router's choice. x: [tokens, hidden]."""
    correction = weights[layer.router.correction] if layer.router.correction else None
    return route(layer.router, F.linear(x, weights[layer.router.name]), correction)


def route(router: Router, logits: Tensor, correction: Tensor | None = None) -> Routing:
    """Scores, top-k (of the best groups), renormalised and scaled where the model does. logits: [tokens, experts]."""
    scores = logits.float().sigmoid() if router.score == "sigmoid" else logits.float().softmax(-1)
    ranked = scores if correction is None else scores + correction
    if router.groups > 1:
        ranked = _in_best_groups(router, ranked)
    if ranked is scores:
        weights, experts = scores.topk(router.k, dim=-1)
    else:
        experts = ranked.topk(router.k, dim=-1).indices
        weights = scores.gather(-1, experts)
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
