"""Logits block by block: a model larger than memory scores with one block resident."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from compress.models.forward import embedded, final_norm, logits
from compress.models.spec import ModelSpec
from compress.scoring.source import Generates
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import walk
from compress.weights import Loader

IN_MEMORY_BYTES = 256 << 20  # hidden states beyond this go to a temporary file
BATCH_TOKENS = 8192


class StreamedSource:
    """A LogitSource over any provider of weights: a checkpoint, a journal, a decoded file.

    load(name) returns the checkpoint tensor `name` in any float type; it is called once per tensor and pass. Only the
    hidden states of all sequences are kept between blocks. generator: opens what continues text for this model (block by
    block that would read all weights for every token), where there is such a thing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        load: Loader,
        name: str,
        placement: Placement = CPU,
        *,
        generator: Callable[[], Generates] | None = None,
    ):
        self.spec, self.load, self.name, self.placement = spec, load, name, placement
        self.vocab_size, self.generator = spec.vocab_size, generator
        self.watch: Callable[[float], None] | None = None

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """See LogitSource.logits."""
        return self.tails(sequences, [len(sequence) for sequence in sequences])

    def tails(self, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> Iterator[np.ndarray]:
        """See Tails.tails."""
        if not sequences:
            return
        states = self.final_states(sequences)
        head = self.placement.weight(self.load(self.spec.head))
        for row, count in zip(states, counts, strict=True):
            with torch.inference_mode():  # not around the yield: the caller would run in it, too
                scores = logits(self.spec, head, row[len(row) - count :]).cpu().numpy()
            yield scores

    def final_states(self, sequences: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Hidden states behind the last norm, float32 [len(sequence), hidden_size] for each sequence in order.

        Sequences of a batch are padded on the right, which causal attention never sees.
        """
        spec = self.spec
        lengths = [len(s) for s in sequences]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        hidden = _scratch(int(starts[-1]), spec.hidden_size)
        table = self.load(spec.embeddings)
        for sequence, start in zip(sequences, starts, strict=False):
            ids = torch.from_numpy(np.asarray(sequence, dtype=np.int64))
            hidden[start : start + len(sequence)] = embedded(spec, table, ids)
        del table
        batches, done = _batches(lengths), 0
        with torch.inference_mode():
            for block in walk(spec, self.load, self.placement):
                for batch in batches:
                    padded = torch.zeros(len(batch), max(lengths[i] for i in batch), spec.hidden_size)
                    for row, i in enumerate(batch):
                        padded[row, : lengths[i]] = hidden[starts[i] : starts[i + 1]]
                    out = block.forward(self.placement.put(padded))
                    for row, i in enumerate(batch):
                        hidden[starts[i] : starts[i + 1]] = out[row, : lengths[i]]
                    done += sum(lengths[i] for i in batch)
                    if self.watch is not None:
                        self.watch(done / (spec.layers * len(hidden)))
            norm = self.placement.weight(self.load(spec.final_norm))
        for i in range(len(sequences)):
            with torch.inference_mode():
                states = final_norm(spec, norm, self.placement.put(hidden[starts[i] : starts[i + 1]]))
            yield states


def _scratch(rows: int, width: int) -> Tensor:
    """Room for hidden states, in memory while it is small."""
    if rows * width * 4 <= IN_MEMORY_BYTES:
        return torch.empty(rows, width)
    file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the mapping)
    file.truncate(rows * width * 4)
    return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=(rows, width)))


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of similar length together, so that little is padded."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
