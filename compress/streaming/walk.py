"""Activations on their way through the blocks of a model, half a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.limits import BATCH_TOKENS
from compress.models.forward import forward_attention, forward_ffn
from compress.models.spec import ModelSpec
from compress.streaming.journal import Activations

Half = Literal["attention", "ffn"]
HALVES: tuple[Half, Half] = ("attention", "ffn")
STAGES_OF: Mapping[Half, tuple[int, int]] = {"attention": (0, 1), "ffn": (2, 3)}


@dataclass(frozen=True)
class Streams:
    """Calibration activations at the input of a block. `original` is None when no solver looks at the drift."""

    compressed: Activations
    original: Activations | None

    @property
    def windows(self) -> int:
        return self.compressed.shape[0]

    @property
    def batch(self) -> int:
        return max(1, BATCH_TOKENS // self.compressed.shape[1])

    def delete(self) -> None:
        for stream in (self.compressed, self.original):
            if stream is not None:
                stream.delete()


def embed(table: Tensor, ids: np.ndarray, into: Activations, batch: int) -> None:
    """Write the embeddings of all windows. ids: [windows, length]."""
    with into.writing() as out:
        for start in range(0, len(ids), batch):
            tokens = torch.from_numpy(np.ascontiguousarray(ids[start : start + batch])).long()
            out.append(table[tokens].float())


def advance(
    spec: ModelSpec,
    layer: int,
    half: Half,
    weights: Mapping[str, Tensor],
    source: Activations,
    target: Activations,
    batch: int,
) -> None:
    """Run half a block over all windows. Raises NumericalError naming the block and the sample."""
    forward = forward_attention if half == "attention" else forward_ffn
    with target.writing() as out:
        for start in range(0, source.shape[0], batch):
            hidden = forward(spec, layer, weights, source.read(start, min(start + batch, source.shape[0])))
            assert hidden is not None
            if not torch.isfinite(hidden.sum()):  # the sum of finite values may overflow, too
                bad = (~torch.isfinite(hidden).flatten(1).all(1)).nonzero()
                if len(bad):
                    raise NumericalError(
                        f"the {half} output of block {layer} is not finite for calibration sample "
                        f"{start + int(bad[0])}; the checkpoint overflows there, drop the sample or "
                        "check the weights"
                    )
            out.append(hidden)


class Walk:
    """The activations of one model, from its embeddings on; they move by half a block, and only the last file is kept."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[str], Tensor],
        ids: np.ndarray,
        scratch: Callable[[str], Activations],
        name: str,
    ):
        self.spec, self.scratch, self.name, self.steps = spec, scratch, name, 0
        self.at, self.batch = scratch(f"{name}-{0:05d}"), max(1, BATCH_TOKENS // ids.shape[1])
        embed(load("model.embed_tokens.weight"), ids, self.at, self.batch)

    def advance(self, layer: int, half: Half, load: Callable[[str], Tensor]) -> None:
        """Pass half a block, whose tensors `load` gives."""
        weights = {t.name: load(t.name).float() for t in self.spec.block_tensors(layer) if t.half == half}
        self.steps += 1
        target = self.scratch(f"{self.name}-{self.steps:05d}")
        advance(self.spec, layer, half, weights, self.at, target, self.batch)
        self.at.delete()
        self.at = target

    def skip(self, layers: Iterable[int], load: Callable[[str], Tensor]) -> None:
        """Pass whole layers."""
        for layer in layers:
            for half in HALVES:
                self.advance(layer, half, load)
