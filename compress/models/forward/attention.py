"""Grouped-query attention, see `layers.attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps, rms_norm
from compress.models.forward.rope import rope_tables, rotate
from compress.models.layers.attention import Attention
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer, prefix = branch.sublayer, "self_attn."
    assert isinstance(layer, Attention)
    taps.see("attention.in", x)
    if taps.end(0):
        return None
    q, k, v = (weights.linear(f"{prefix}{leaf}_proj", x) for leaf in "qkv")
    gate = None
    if layer.gate:
        q, gate = (part.flatten(2) for part in q.unflatten(-1, (layer.heads, -1)).chunk(2, dim=-1))
    cos, sin = rope_tables(layer.rope, x.shape[1], x.device)

    def heads(x: Tensor, norm: str) -> Tensor:
        x = x.view(*x.shape[:2], -1, layer.head_dim)
        if layer.qk_norm:
            x = rms_norm(x, weights.shifted(f"{prefix}{norm}.weight", layer.norm_shift), layer.eps)
        return rotate(x.transpose(1, 2), cos, sin)

    v = v.view(*v.shape[:2], -1, layer.head_dim).transpose(1, 2)
    x = attend(heads(q, "q_norm"), heads(k, "k_norm"), v, layer.window)
    if gate is not None:
        x = x * torch.sigmoid(gate)
    taps.see("attention.out", x)
    return None if taps.end(1) else weights.linear(f"{prefix}o_proj", x)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention. q: [B, heads, T, d]; k, v: [B, kv_heads, T, d] -> [B, T, heads * d]."""
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)
