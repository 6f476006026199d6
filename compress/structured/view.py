"""A model that lost layers, experts, heads or channels, seen through the original's tensors, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec, TensorSpec


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """What a layer keeps of one of the original's.

    layer: the original's index; experts: theirs, ascending, none in a dense layer; kv_heads: theirs, ascending, each with
    the query heads that read it; channels: int64, ascending, by feed-forward: "mlp", "shared", or "experts.{e}" with
    the original's e. A feed-forward that is not named keeps all.
    """

    layer: int
    experts: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StructureView:
    """Tensors of the reduced model `spec` by their names in it.

    kept: one a layer; tensors: those that are no mere selections of `original`'s.
    """

    kept: tuple[KeptLayer, ...]
    tensors: Mapping[str, Tensor]
    original: ModelSpec
    spec: ModelSpec

    def load(self, name: str, load: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the reduced model; `load` gives the original's, by their names.

        It has the original's float type. Raises KeyError for a name that the reduced model does not have.
        """
        tensor = self._specs[name]
        if name in self.tensors:
            return self.tensors[name]
        whole = load(self.source(name))
        for dim, index in enumerate(self._selection(tensor)):
            if index is not None:
                whole = whole.index_select(dim, index)
        return whole

    def source(self, name: str) -> str:
        """The original's tensor that one of the reduced model is, or is a part of."""
        tensor = self._specs[name]
        if tensor.layer is None:
            return name
        kept, root = self.kept[tensor.layer], f"model.layers.{tensor.layer}."
        leaf = name.removeprefix(root)
        if tensor.expert is not None:
            assert self.spec.family.moe is not None
            prefix = self.spec.family.moe.expert
            new, old = prefix.format(e=tensor.expert), prefix.format(e=kept.experts[tensor.expert])
            leaf = old + leaf.removeprefix(new)
        return f"model.layers.{kept.layer}.{leaf}"

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return {t.name: t for t in self.spec.tensors()}

    def _selection(self, tensor: TensorSpec) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns of the original's tensor that are left, None where all are."""
        index = None if tensor.layer is None else self._index(tensor, self.kept[tensor.layer])
        if tensor.role == "attention.o" or tensor.role.endswith(".down"):
            return None, index
        return index, None

    def _index(self, tensor: TensorSpec, kept: KeptLayer) -> Tensor | None:
        """What is left of the inner side of a matrix, that which is not the residual stream, or of its bias."""
        leaf, moe = tensor.name.split(".")[-2], self.spec.family.moe
        if tensor.role == "norms" or (tensor.role == "biases" and leaf in ("o_proj", "down_proj")):
            return None
        if tensor.role == "router":  # the gate of a shared expert is one, too
            return torch.tensor(kept.experts) if moe is not None and tensor.name.endswith(moe.router) else None
        if ".self_attn." in tensor.name:
            if len(kept.kv_heads) == self.original.kv_heads:
                return None
            queries = self.original.heads // self.original.kv_heads if leaf in ("q_proj", "o_proj") else 1
            return runs(kept.kv_heads, queries * self.original.head_dim)
        if tensor.expert is not None:
            return kept.channels.get(f"experts.{kept.experts[tensor.expert]}")
        return kept.channels.get("shared" if tensor.role.startswith("shared_experts") else "mlp")


def runs(picks: Sequence[int], length: int) -> Tensor:
    """Indices of whole runs of `length`: run p is p * length, ..., (p + 1) * length - 1."""
    return (torch.tensor(picks)[:, None] * length + torch.arange(length)).flatten()
