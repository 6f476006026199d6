"""What sub-layers compute: pure functions of their weights in float32, with taps on every linear's input.

One file for each kind that `compress.models.layers` declares. A test compares every family with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor

from compress.models.forward.base import NO_TAPS, Named, Observer, Pooled, Routing, Taps, rms_norm
from compress.models.spec import Branch, ModelSpec

__all__ = [
    "NO_TAPS", "Observer", "Pooled", "Routing", "Taps", "final_norm", "forward_block", "forward_branch", "rms_norm",
]  # fmt: skip


def forward_branch(
    branch: Branch, weights: Mapping[str, Tensor], hidden: Tensor, taps: Taps = NO_TAPS
) -> Tensor | None:
    """One sub-layer, residual included: x + f(norm(x)), [B, T, hidden] -> the same; None where `taps` end it before.

    weights: full checkpoint names -> float32; hidden: float32, not modified.
    """
    sublayer, named = branch.sublayer, Named(weights, branch.root)
    x = rms_norm(hidden, named.shifted(f"{sublayer.norm}.weight", sublayer.norm_shift), branch.spec.norm_eps)
    out = import_module(f"compress.models.forward.{sublayer.forward}").forward(branch, named, x, taps)
    return None if out is None else hidden + out


def forward_block(
    spec: ModelSpec, layer: int, weights: Mapping[str, Tensor], hidden: Tensor, taps: Taps = NO_TAPS
) -> Tensor:
    """Run one block. weights: full checkpoint names -> float32; hidden: float32 [B, T, hidden_size], not modified."""
    for branch in spec.branches(layer):
        out = forward_branch(branch, weights, hidden, taps)
        assert out is not None
        hidden = out
    return hidden


def final_norm(spec: ModelSpec, norm: Tensor, states: Tensor) -> Tensor:
    """The norm in front of the head. norm: its stored weights; states: float32 [..., hidden]."""
    shift = spec.family.final_shift
    return rms_norm(states, norm + shift if shift else norm, spec.norm_eps)
