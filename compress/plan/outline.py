"""Every tensor of a model and what becomes of it; blocks that are alike are kept once. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from compress.models.spec import ModelSpec
from compress.plan.tensor import PlannedTensor


@dataclass(frozen=True)
class Outline:
    """What becomes of every tensor of a model: sizes are counted by kinds of block, tensors are listed when asked for.

    outer: the tensors outside the blocks; kinds: those of the first block of each kind, in order; kind_of: the kind of
    every block. Blocks of a kind have the same sub-layers, planned alike, under names of the same length. beside: what goes
    along with the decoder.
    """

    spec: ModelSpec
    outer: tuple[PlannedTensor, ...]
    kinds: tuple[tuple[PlannedTensor, ...], ...]
    kind_of: tuple[int, ...]
    beside: tuple[PlannedTensor, ...] = ()

    @cached_property
    def counted(self) -> tuple[tuple[PlannedTensor, int], ...]:
        """The tensors outside the blocks and those of one block of each kind, in execution order, each with how many it
        stands for."""
        times = Counter(self.kind_of)
        inside = ((t, times[kind]) for kind, block in enumerate(self.kinds) for t in block)
        return ((self.outer[0], 1), *inside, *((t, 1) for t in (*self.outer[1:], *self.beside)))

    @cached_property
    def blocks(self) -> tuple[tuple[PlannedTensor, ...], ...]:
        """The tensors of every block."""
        return tuple(
            tuple(replace(t, spec=spec) for t, spec in zip(self.kinds[kind], self.spec.block_tensors(n), strict=True))
            for n, kind in enumerate(self.kind_of)
        )

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every tensor in execution order."""
        return (self.outer[0], *(t for block in self.blocks for t in block), *self.outer[1:], *self.beside)

    def changed(self, change: Callable[[PlannedTensor], PlannedTensor]) -> Outline:
        """With `change` made to every tensor; no blocks are taken to be alike any more."""
        kinds = tuple(tuple(map(change, block)) for block in self.blocks)
        outer, beside = tuple(map(change, self.outer)), tuple(map(change, self.beside))
        return Outline(self.spec, outer, kinds, tuple(range(len(kinds))), beside)
