"""What all forwards share: taps, routing, the norm, a linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import products

Observer = Callable[[str, Tensor, "Tensor | None"], None]
"""(key of an input, x [n, in], routing weight [n] or None): sees the input of every group of linears before it is used."""


@dataclass(frozen=True)
class Routing:
    """experts: int64 [tokens, k]; weights: float32 [tokens, k]."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Pooled:
    """Cold experts that also see every `stride`-th token of the block, routed to them or not.

    Their activations are observed under the key of their pool, without a gate; the block's output does not change.
    """

    experts: frozenset[int]
    stride: int


@dataclass(frozen=True)
class Taps:
    """Who looks on while a sub-layer runs, and how far it runs.

    until: ends after the inputs of this stage have been observed. routing: use these experts instead of the router's choice;
    on_route sees the routing used; pooled: see Pooled; experts: those whose activations are wanted when `until` cuts the pass
    short, all by default.
    """

    observe: Observer | None = None
    until: int | None = None
    routing: Routing | None = None
    on_route: Callable[[Routing], None] | None = None
    pooled: Pooled | None = None
    experts: frozenset[int] | None = None

    def see(self, key: str, x: Tensor, gate: Tensor | None = None) -> None:
        """Show an input; x: [..., in]."""
        if self.observe is not None:
            self.observe(key, x.reshape(-1, x.shape[-1]), gate)

    def end(self, stage: int) -> bool:
        """Whether the pass ends behind the inputs of a stage."""
        return self.until is not None and self.until <= stage


NO_TAPS = Taps()


class Named(Mapping[str, Tensor]):
    """The tensors of one block by their names in it."""

    def __init__(self, weights: Mapping[str, Tensor], root: str):
        self.weights, self.root = weights, root

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.root + name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (name.removeprefix(self.root) for name in self.weights if name.startswith(self.root))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shifted(self, name: str, shift: float) -> Tensor:
        """A norm's weights as the model uses them."""
        return self[name] + shift if shift else self[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T + b of the linear `name`."""
        return products.linear(x, self[name + ".weight"], self.get(name + ".bias"))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, without weight where there is none."""
    # in place only where autograd does not need what was there
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale if weight is None else x * scale * weight
