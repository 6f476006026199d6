"""The feed-forward, see `layers.mlp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward.base import Named, Taps
from compress.models.layers.mlp import Activation, FeedForward, Mlp
from compress.models.spec import Branch


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, Mlp)
    taps.see("mlp.in", x)
    if taps.end(0):
        return None
    act = activations(layer.feed_forward, weights, x)
    taps.see("mlp.act", act)
    return None if taps.end(1) else weights.linear(layer.prefix + layer.leaves[-1], act)


def activations(parts: FeedForward, weights: Named, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """What the down projection reads. x: [..., hidden]; scale: of x, [..., 1], applied behind the linears -> [..., width]."""
    leaves = (parts.joined,) if parts.joined else parts.leaves[:-1]
    found = [weights.linear(parts.prefix + leaf, x) for leaf in leaves]
    if scale is not None:
        found = [values * scale for values in found]
    *gates, up = found[0].chunk(2, dim=-1) if parts.joined else found
    return activate(parts.activation, up, *gates)


def activate(activation: Activation, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """f(gate) (up + offset), or f(up), see `Activation`. Tensors of one shape."""
    if activation.limit is not None:
        limit = activation.limit
        up = up.clamp(-limit, limit) if gate is not None else up.clamp(max=limit)
        gate = None if gate is None else gate.clamp(max=limit)
    inside = up if gate is None else gate
    if activation.function == "relu2":
        out = F.relu(inside).square()
    elif activation.function == "gelu_tanh":
        out = F.gelu(inside, approximate="tanh")
    elif activation.slope == 1.0:
        out = F.silu(inside)
    else:
        out = inside * torch.sigmoid(activation.slope * inside)
    if gate is None:
        return out
    return out * (up + activation.offset) if activation.offset else out * up
