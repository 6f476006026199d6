"""Grouped-query attention, see `layers.attention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps, rms_norm
from compress.models.forward.rope import rope_tables, rotate
from compress.models.layers.attention import Attention, Temperature
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, Attention)
    taps.see("attention.in", x)
    if taps.end(0):
        return None
    if layer.joined:
        q, k, v = weights.linear(layer.prefix + layer.joined, x).split(layer.rows, dim=-1)
    else:
        leaves = layer.leaves[: 2 if layer.keys_are_values else 3]
        q, k, *own = (weights.linear(layer.prefix + leaf, x) for leaf in leaves)
        v = own[0] if own else k
    gate = None
    if layer.gate:
        q, gate = (part.flatten(2) for part in q.unflatten(-1, (layer.heads, -1)).chunk(2, dim=-1))
    if layer.gating:
        gate = weights.linear(layer.prefix + layer.gating, x)
    turn = None if layer.rope is None else rope_tables(layer.rope, x.shape[1], x.device)

    def heads(x: Tensor, leaf: str) -> Tensor:
        def normed(x: Tensor) -> Tensor:
            if layer.qk_norm == "bare":
                return rms_norm(x, None, layer.eps)
            return rms_norm(x, weights.shifted(f"{layer.prefix}{leaf}.weight", layer.norm_shift), layer.eps)

        if layer.qk_norm == "heads":
            x = normed(x)
        x = x.view(*x.shape[:2], -1, layer.head_dim)
        each = layer.qk_norm in ("head", "bare")
        if each and not layer.norm_after_rope:
            x = normed(x)
        x = x.transpose(1, 2)
        if turn is not None:
            x = rotate(x, *turn, interleaved=layer.interleaved)
        return normed(x) if each and layer.norm_after_rope else x

    q, k = (heads(part, leaf) for part, leaf in zip((q, k), layer.norms, strict=True))
    if layer.temperature is not None:
        q = q * temperatures(layer.temperature, x.shape[1], x.device)[:, None]
    v = v.view(*v.shape[:2], -1, layer.value_width).transpose(1, 2)
    if layer.value_norm:
        v = rms_norm(v, None, layer.eps)
    if layer.value_scale != 1.0:
        v = v * layer.value_scale
    sinks = weights[layer.prefix + layer.sinks] if layer.sinks else None
    x = attend(q, k, v, Sight(layer.window, layer.chunk), scale=layer.scale, softcap=layer.softcap, sinks=sinks)
    if gate is not None:
        x = x * torch.sigmoid(gate)
    taps.see("attention.out", x)
    return None if taps.end(1) else weights.linear(layer.prefix + layer.leaves[3], x)


def temperatures(given: Temperature, length: int, device: torch.device | None = None) -> Tensor:
    """What queries are multiplied by, float32 [length]."""
    position = torch.arange(length, device=device, dtype=torch.float32)
    return 1 + given.scale * torch.log1p(torch.floor((position + given.first) / given.every))


@dataclass(frozen=True)
class Sight:
    """Which earlier tokens a token sees: the last `window`, itself among them, of its own run of `chunk`; None for all."""

    window: int | None = None
    chunk: int | None = None

    def mask(self, length: int, device: torch.device) -> Tensor:
        """bool [tokens, tokens seen]."""
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        mask = distance >= 0
        if self.window is not None:
            mask &= distance < self.window
        if self.chunk is not None:
            mask &= position[:, None] // self.chunk == position[None, :] // self.chunk
        return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, see `Attention`. q: [B, heads, T, d]; k, v: [B, kv_heads, T, d]; sinks: [heads] -> [B, T, heads * d]."""
    length = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    narrow = any(size is not None and size < length for size in (sight.window, sight.chunk))
    mask = sight.mask(length, q.device) if narrow or sinks is not None or softcap else None
    if sinks is not None:
        # a token in front of all, which scores what the sink of the query's head says and has no value
        q = torch.cat((q, (sinks / scale)[:, None, None].expand(*q.shape[:-1], 1)), dim=-1)
        k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 0, 1, 0))
        k[:, :, 0, -1] = 1.0
        assert mask is not None
        mask = F.pad(mask, (1, 0), value=True)
    if softcap:
        assert mask is not None
        return _capped(q, k, v, mask, scale, softcap)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention by scores that a softcap bounds, head by head: the scores of all take much room."""
    each, out = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // each].transpose(1, 2) * scale
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
        out.append(scores.softmax(-1) @ v[:, head // each])
    return torch.cat(out, dim=-1)
