"""The gated feed-forward, see `layers.mlp`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    taps.see("mlp.in", x)
    if taps.end(0):
        return None
    act = F.silu(weights.linear("mlp.gate_proj", x)) * weights.linear("mlp.up_proj", x)
    taps.see("mlp.act", act)
    return None if taps.end(1) else weights.linear("mlp.down_proj", act)
