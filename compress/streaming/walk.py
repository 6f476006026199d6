"""One walk over the blocks of a model: the only loop over them, whatever is done on the way.

`walk` gives the blocks in order, the weights of one at a time on the device. The run, surveys, recovery and scoring go
through it; a `Stream` is text on that way, as hidden states in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.models.forward import NO_TAPS, Taps, embedded, forward_block, forward_branch
from compress.models.spec import Branch, ModelSpec
from compress.streaming.activations import Activations
from compress.streaming.placement import CPU, Placement
from compress.weights import Loader

Scratch = Callable[[str], Activations]
"""Activation files by name, all of the shape of one text."""


class BlockAt:
    """One block of a model on the walk. Its weights are read when they are first asked for and kept while it is."""

    def __init__(self, spec: ModelSpec, layer: int, load: Loader, placement: Placement):
        self.spec, self.layer, self.placement, self._load = spec, layer, placement, load

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.spec.branches(self.layer)

    def load(self, name: str) -> Tensor:
        """One tensor, float32 on the device, read anew."""
        return self.placement.weight(self._load(name))

    def of(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of one sub-layer, read anew."""
        return {t.name: self.load(t.name) for t in branch.tensors}

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """All its tensors by name."""
        return {name: tensor for branch in self.branches for name, tensor in self.of(branch).items()}

    def forward(self, hidden: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Run it whole; hidden: float32 [B, T, hidden], not modified."""
        return forward_block(self.spec, self.layer, self.weights, hidden, taps)


def walk(
    spec: ModelSpec,
    load: Loader,
    placement: Placement = CPU,
    *,
    layers: Iterable[int] | None = None,
    backwards: bool = False,
) -> Iterator[BlockAt]:
    """The blocks of a model in order, or those of `layers`, or the other way round. load(name) gives a tensor of `spec`."""
    order = list(range(spec.layers) if layers is None else layers)
    for layer in reversed(order) if backwards else order:
        yield BlockAt(spec, layer, load, placement)


@dataclass(frozen=True)
class Streams:
    """Calibration activations at one place of the model. `original` is None when no solver looks at the drift."""

    compressed: Activations
    original: Activations | None

    @property
    def windows(self) -> int:
        return self.compressed.shape[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of their files."""
        return tuple(stream.path for stream in (self.compressed, self.original) if stream is not None)


def embed(spec: ModelSpec, table: Tensor, ids: np.ndarray, into: Activations) -> None:
    """Write the embeddings of all windows. table: [vocabulary, hidden]; ids: [windows, length]."""
    with into.writing() as out:
        for start, stop in into.batches:
            tokens = torch.from_numpy(np.ascontiguousarray(ids[start:stop])).long()
            out.append(embedded(spec, table, tokens))


def advance(branch: Branch, weights: Mapping[str, Tensor], source: Activations, target: Activations) -> None:
    """Run one sub-layer over all windows. Raises NumericalError naming the block and the sample."""
    with target.writing() as out:
        for start, stop in source.batches:
            hidden = forward_branch(branch, weights, source.read(start, stop))
            assert hidden is not None
            if not torch.isfinite(hidden.sum()):  # the sum of finite values may overflow, too
                bad = (~torch.isfinite(hidden).flatten(1).all(1)).nonzero()
                if len(bad):
                    raise NumericalError(
                        f"the {branch.sublayer.half} output of block {branch.layer} is not finite for calibration sample "
                        f"{start + int(bad[0])}; the checkpoint overflows there, drop the sample or check the weights"
                    )
            out.append(hidden)


class Stream:
    """The activations of one model, from its embeddings on; they move by one sub-layer, and only the last file is kept."""

    def __init__(
        self, spec: ModelSpec, load: Loader, ids: np.ndarray, scratch: Scratch, name: str, placement: Placement = CPU
    ):
        self.spec, self.load, self.scratch, self.name, self.placement = spec, load, scratch, name, placement
        self.steps = 0
        self.at = scratch(f"{name}-{0:05d}")
        embed(spec, load(spec.embeddings), ids, self.at)

    def advance(self, branch: Branch, weights: Mapping[str, Tensor] | None = None) -> None:
        """Pass one sub-layer, with other weights than its own where these are given."""
        own = weights or BlockAt(self.spec, branch.layer, self.load, self.placement).of(branch)
        self.steps += 1
        target = self.scratch(f"{self.name}-{self.steps:05d}")
        advance(branch, own, self.at, target)
        self.at.delete()
        self.at = target

    def skip(self, layers: Iterable[int]) -> None:
        """Pass whole blocks."""
        for block in walk(self.spec, self.load, self.placement, layers=layers):
            for branch in block.branches:
                self.advance(branch, block.of(branch))
