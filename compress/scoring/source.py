"""Where logits come from: one small protocol.

Everything that is scored (the original, a decoded model, a GGUF inside llama.cpp) is a `LogitSource`, so every number in
a scorecard comes from the same arithmetic over whichever engine produced the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class LogitSource(Protocol):
    """Anything that turns token ids into next-token logits.

    name        what the report calls it: "original", "llama.cpp", "decoded weights", ...
    vocab_size  columns of every array it yields
    """

    name: str
    vocab_size: int

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield float32 [len(sequence), vocab_size] for each 1-D integer sequence, lazily and in order.

        Row t holds the logits of the token that follows sequence[:t + 1]. Each sequence starts from an empty
        context; nothing (no BOS) is added. Sequences may differ in length.
        """
        ...
