"""The gated short convolution, see `layers.short_conv`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps
from compress.models.layers.short_conv import ShortConv
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, ShortConv)
    taps.see("attention.in", x)
    if taps.end(0):
        return None
    before, behind, values = weights.linear(f"{layer.prefix}in_proj", x).chunk(3, dim=-1)
    mixed = convolved(before * values, weights[f"{layer.prefix}conv.weight"], weights.get(f"{layer.prefix}conv.bias"))
    x = behind * mixed
    taps.see("attention.out", x)
    return None if taps.end(1) else weights.linear(f"{layer.prefix}out_proj", x)


def convolved(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Every channel with its own kernel over the tokens so far. x: [B, T, channels]; kernels: [channels, 1, tokens]."""
    past = F.pad(x.transpose(1, 2), (kernels.shape[-1] - 1, 0))
    return F.conv1d(past, kernels, bias, groups=len(kernels)).transpose(1, 2)
