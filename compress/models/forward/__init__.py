"""What sub-layers compute: pure functions of their weights in float32, with taps on every linear's input.

One file for each kind that `compress.models.layers` declares. A test compares every family with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor

from compress.models.forward.base import NO_TAPS, Named, Observer, Pooled, Routing, Taps, rms_norm
from compress.models.spec import Branch, ModelSpec

__all__ = [
    "NO_TAPS", "Observer", "Pooled", "Routing", "Taps", "embedded", "final_norm", "forward_block", "forward_branch", "logits",
    "rms_norm",
]  # fmt: skip


def forward_branch(
    branch: Branch, weights: Mapping[str, Tensor], hidden: Tensor, taps: Taps = NO_TAPS
) -> Tensor | None:
    """One sub-layer, residual included: (x + residual * post(f(norm(x)))) * scalar, [B, T, hidden] -> the same; None where
    `taps` end it before.

    weights: full checkpoint names -> float32; hidden: float32, not modified.
    """
    sublayer, named = branch.sublayer, Named(weights, branch.root)

    def normed(x: Tensor, norm: str) -> Tensor:
        if not norm:
            return x
        return rms_norm(x, named.shifted(f"{norm}.weight", sublayer.norm_shift), branch.spec.norm_eps)

    compute = import_module(f"compress.models.forward.{sublayer.forward}").forward
    out = compute(branch, named, normed(hidden, sublayer.norm), taps)
    if out is None:
        return None
    out = normed(out, sublayer.post)
    out = hidden + (out if sublayer.residual == 1.0 else out * sublayer.residual)
    return out * named[sublayer.scalar] if sublayer.scalar else out


def forward_block(
    spec: ModelSpec, layer: int, weights: Mapping[str, Tensor], hidden: Tensor, taps: Taps = NO_TAPS
) -> Tensor:
    """Run one block. weights: full checkpoint names -> float32; hidden: float32 [B, T, hidden_size], not modified."""
    for branch in spec.branches(layer):
        out = forward_branch(branch, weights, hidden, taps)
        assert out is not None
        hidden = out
    return hidden


def embedded(spec: ModelSpec, table: Tensor, ids: Tensor) -> Tensor:
    """What the first block reads, float32 [..., hidden], or float64 where the table is. table: [vocabulary, hidden]; ids:
    int64 [...].

    Where the model scales it, by the exact number, as transformers in float32 and llama.cpp do; in bfloat16 transformers
    rounds that number, too.
    """
    rows = table[ids.to(table.device)]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows if spec.ends.scale == 1.0 else rows * spec.ends.scale


def logits(spec: ModelSpec, head: Tensor, states: Tensor) -> Tensor:
    """Scores of the next token, [..., vocabulary]. head: [vocabulary, hidden]; states: behind the last norm, [..., hidden]."""
    ends, out = spec.ends, states @ head.T
    if ends.divisor != 1.0:
        out = out / ends.divisor
    return out if ends.softcap is None else ends.softcap * torch.tanh(out / ends.softcap)


def final_norm(spec: ModelSpec, norm: Tensor, states: Tensor) -> Tensor:
    """The norm in front of the head. norm: its stored weights; states: float32 [..., hidden]."""
    shift = spec.family.final_shift
    return rms_norm(states, norm + shift if shift else norm, spec.norm_eps)
