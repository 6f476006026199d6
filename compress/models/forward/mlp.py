"""The gated feed-forward, see `layers.mlp`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps
from compress.models.layers.mlp import Mlp
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, Mlp)
    gate, up, down = (layer.prefix + leaf for leaf in layer.leaves)
    taps.see("mlp.in", x)
    if taps.end(0):
        return None
    act = F.silu(weights.linear(gate, x)) * weights.linear(up, x)
    taps.see("mlp.act", act)
    return None if taps.end(1) else weights.linear(down, act)
