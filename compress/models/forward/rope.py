"""Rotary positions (RoPE, arXiv 2104.09864), in the layout of the checkpoint: halves of a head, or neighbours."""

from __future__ import annotations

import json
from functools import cache

import torch
from torch import Tensor

from compress.errors import UnsupportedModel
from compress.models.layers.rope import TYPES, Rope


@cache
def _frequencies(rope: Rope, length: int) -> tuple[Tensor, float]:
    """Angle a position of every pair of channels, float32 [dim / 2], and what cos and sin are multiplied by, for texts of so
    many tokens."""
    if not rope.scaling:
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
        return 1.0 / rope.theta**exponents, 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.parameters.get("rope_type", rope.parameters.get("type"))
    if kind not in TYPES:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported: {', '.join(TYPES)}")
    fields = json.loads(rope.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    layer_type = rope.layer_type or None
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length, layer_type=layer_type)
    return frequencies.float(), float(factor)


@cache
def rope_tables(rope: Rope, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, dim]."""
    with torch.inference_mode(False):  # kept for later calls, some of which meet autograd
        frequencies, factor = _frequencies(rope, length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first channels of every head, as many as the tables have. x: [B, heads, T, head_dim]; interleaved: pairs are
    neighbours, else a channel of the first half and the same of the second."""
    dim = cos.shape[-1]
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]  # both of a pair share their angle
    pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    parts = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)
