"""The selective state space of Mamba-2, see `layers.mamba2`; the scan is that of arXiv 2405.21060, section 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps, rms_norm
from compress.models.forward.short_conv import convolved
from compress.models.layers.mamba2 import Mamba2
from compress.models.spec import Branch

CHUNK = 64
"""Tokens that are computed like attention, [heads, tokens, tokens]; states go from one run of them to the next."""


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, Mamba2)
    prefix, shared = layer.prefix, layer.groups * layer.state
    taps.see("attention.in", x)
    if taps.end(0):
        return None
    parts = (layer.inner, layer.channels, layer.heads)
    gate, mixed, steps = weights.linear(f"{prefix}in_proj", x).split(parts, dim=-1)
    mixed = F.silu(convolved(mixed, weights[f"{prefix}conv1d.weight"], weights.get(f"{prefix}conv1d.bias")))
    values, keys, queries = mixed.split((layer.inner, shared, shared), dim=-1)
    values = values.unflatten(-1, (layer.heads, -1))
    steps = F.softplus(steps + weights[f"{prefix}dt_bias"]).clamp(*layer.limits)
    keys, queries = (part.unflatten(-1, (layer.groups, -1)) for part in (keys, queries))
    out = scan(values * steps[..., None], -torch.exp(weights[f"{prefix}A_log"]) * steps, keys, queries)
    out = (out + values * weights[f"{prefix}D"][:, None]).flatten(2) * F.silu(gate)
    runs = (layer.norm_groups, -1)
    x = rms_norm(out.unflatten(-1, runs), weights[f"{prefix}norm.weight"].view(runs), layer.eps).flatten(2)
    taps.see("attention.out", x)
    return None if taps.end(1) else weights.linear(f"{prefix}out_proj", x)


def scan(values: Tensor, decays: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """S_t = exp(decay_t) S_(t-1) + value_t key_t^T, read as S_t query_t, of every head.

    values: [B, T, heads, n]; decays: [B, T, heads], at most 0; keys, queries: [B, T, groups, state] -> [B, T, heads, n].
    """
    groups, out = keys.shape[2], []
    state = values.new_zeros(len(values), groups, values.shape[2] // groups, values.shape[3], keys.shape[3])
    for v, a, k, q in zip(*(part.split(CHUNK, dim=1) for part in (values, decays, keys, queries)), strict=True):
        v, a = v.unflatten(2, (groups, -1)), a.unflatten(2, (groups, -1)).movedim(1, -1)  # [B, groups, each, tokens]
        seen = torch.einsum("btgs,bugs->bgtu", q, k)[:, :, None] * torch.exp(between(a))
        since = torch.exp(a.cumsum(-1))
        before = torch.einsum("btgs,bgens->btgen", q, state) * since.movedim(-1, 1)[..., None]
        out.append((torch.einsum("bgetu,bugen->btgen", seen, v) + before).flatten(2, 3))
        rest = torch.exp(a.flip(-1).cumsum(-1).flip(-1) - a)  # what is left at the end of what each token has brought
        state = since[..., -1, None, None] * state + torch.einsum("bugen,bgeu,bugs->bgens", v, rest, k)
    return torch.cat(out, dim=1)


def between(decays: Tensor) -> Tensor:
    """Sums of what lies behind the second token up to the first, -inf where the first comes earlier: [..., T] -> [..., T, T]."""
    size = decays.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=decays.device)
    alone = decays[..., None].expand(*decays.shape, size).masked_fill(~ones.tril(-1), 0.0)
    return alone.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))
