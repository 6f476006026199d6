"""A model that lost layers, experts, heads or channels, seen through the original's tensors, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compress.models.layers.base import Axis
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
        tensor = self.spec.by_name[name]
        if name in self.tensors:
            return self.tensors[name]
        whole = load(self.source(name))
        for dim, index in enumerate(self._selection(tensor)):
            if index is not None:
                whole = whole.index_select(dim, index)
        return whole

    def source(self, name: str) -> str:
        """The original's tensor that one of the reduced model is, or is a part of."""
        tensor = self.spec.by_name[name]
        if tensor.layer is None:
            return name
        expert = None if tensor.expert is None else self.kept[tensor.layer].experts[tensor.expert]
        return self._sources[tensor.layer][_kind(tensor), expert]

    @cached_property
    def _sources(self) -> tuple[Mapping[tuple[str, int | None], str], ...]:
        """Of every kept layer, the original's names by kind and expert."""
        return tuple(
            {(_kind(t), t.expert): t.name for t in self.original.block_tensors(kept.layer)} for kept in self.kept
        )

    def _selection(self, tensor: TensorSpec) -> tuple[Tensor | None, ...]:
        """By dimension, what is left of the original's tensor, None where all is."""
        if tensor.layer is None:
            return ()
        return tuple(
            None if axis is None else self._index(axis, self.kept[tensor.layer]) for axis in tensor.declared.axes
        )

    def _index(self, axis: Axis, kept: KeptLayer) -> Tensor | None:
        """Entries of the original's dimension that are left."""
        if axis.of == "experts":
            return torch.tensor(kept.experts)
        if axis.of == "kv_heads":
            return None if len(kept.kv_heads) == self.original.kv_heads else runs(kept.kv_heads, axis.run)
        return kept.channels.get(self._names(kept).get(axis.of, axis.of))

    def _names(self, kept: KeptLayer) -> Mapping[str, str]:
        """Experts' feed-forwards by the reduced model's numbers -> by the original's."""
        return {f"experts.{new}": f"experts.{old}" for new, old in enumerate(kept.experts)}


def _kind(tensor: TensorSpec) -> str:
    """What tells a tensor from the others of its layer, whatever the number of its expert."""
    return tensor.declared.name if tensor.expert is None else f"{tensor.role} {tensor.declared.gguf}"


def runs(picks: Sequence[int], length: int) -> Tensor:
    """Indices of whole runs of `length`: run p is p * length, ..., (p + 1) * length - 1."""
    return (torch.tensor(picks)[:, None] * length + torch.arange(length)).flatten()
