"""Where logits come from: one small protocol.

Everything that is scored (the original, a decoded model, a GGUF inside llama.cpp) is a `LogitSource`, so every number in
a scorecard comes from the same arithmetic over whichever engine produced the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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


@runtime_checkable
class Generates(Protocol):
    """An engine that continues text, always the same way: with the likeliest token, the lowest id where several are."""

    name: str

    def continuation(self, prompt: np.ndarray, most: int, stop: Callable[[Sequence[int]], bool]) -> list[int]:
        """Ids behind `prompt` (int64 [n], n > 0; nothing is added to it), `most` at the most.

        Ends before an end-of-generation token of the model, and behind the id with which stop(ids so far) is true.
        """
        ...


@runtime_checkable
class Tails(Protocol):
    """A source that can leave out rows nobody reads: of a question with an answer behind it, all but the answer's."""

    def tails(self, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> Iterator[np.ndarray]:
        """The last counts[i] > 0 rows of what `LogitSource.logits` yields for sequences[i]."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A source that works long before its first row: it calls `watch` with the share of that work that is done, where
    somebody has put a function there."""

    watch: Callable[[float], None] | None


WORK_BEFORE = 0.9  # share of a watched source's work that comes before its first row


def generator(source: object) -> Generates | None:
    """What continues text for a source: itself, or what it opens for that (an attribute `generator` without arguments).
    None where nothing does."""
    if isinstance(source, Generates):
        return source
    opens: Callable[[], Generates] | None = getattr(source, "generator", None)
    return None if opens is None else opens()


@contextmanager
def watched(sources: Sequence[LogitSource], progress: Callable[[float], None]) -> Iterator[Callable[[float], None]]:
    """Progress of several sources that are read in step: what watched ones do before their first row, as part of the whole,
    then what the caller says of the rows."""
    watching = [source for source in {id(source): source for source in sources}.values() if isinstance(source, Watched)]
    before = [0.0] * len(watching)
    each = WORK_BEFORE / max(len(sources), 1)

    def moved(number: int, done: float) -> None:
        before[number] = done
        progress(each * sum(before))

    def rows(done: float) -> None:
        begun = each * sum(before)  # nothing, where it lay on disk
        progress(begun + (1 - begun) * done)

    for number, source in enumerate(watching):
        source.watch = partial(moved, number)
    try:
        yield rows
    finally:
        for source in watching:
            source.watch = None


def tails(
    source: LogitSource,
    sequences: Sequence[np.ndarray],
    counts: Sequence[int],
    progress: Callable[[float], None] = lambda done: None,
) -> Iterator[np.ndarray]:
    """The last counts[i] rows of `source.logits` for each sequence, by the cheapest way that the source has.

    progress is called with the share that is done: with each sequence and, by sources that are watched, before the first.
    """
    with watched([source], progress) as moved:
        if isinstance(source, Tails):
            found = source.tails(sequences, counts)
        else:
            found = (rows[-count:] for rows, count in zip(source.logits(sequences), counts, strict=True))
        for number, rows in enumerate(found, start=1):
            yield rows
            moved(number / len(sequences))
