"""A bar moves while sources work before their first row, as far as they say, and ends at one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from compress.scoring.divergence import score_many
from compress.scoring.source import WORK_BEFORE, tails

WINDOWS = np.arange(24).reshape(4, 6) % 7


class Plain:
    """Row by row, and silent."""

    name, vocab_size = "plain", 7

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for sequence in sequences:
            yield np.eye(7, dtype=np.float32)[sequence]


class Blocks(Plain):
    """Says that it goes through ten blocks before the first row."""

    name = "blocks"

    def __init__(self) -> None:
        self.watch: Callable[[float], None] | None = None

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for block in range(10):
            if self.watch is not None:
                self.watch((block + 1) / 10)
        yield from super().logits(sequences)


def told(reference: Plain | None, candidates: Sequence[Plain]) -> list[float]:
    found: list[float] = []
    score_many(reference, candidates, WINDOWS, progress=lambda done, total: found.append(done / total))
    return found


@pytest.mark.parametrize(
    ("reference", "candidate", "before"),
    [(Plain(), Plain(), 0.0), (Blocks(), Plain(), 0.5), (Plain(), Blocks(), 0.5), (Blocks(), Blocks(), 1.0),
     (None, Blocks(), 1.0)],
)  # fmt: skip
def test_scores(reference: Plain | None, candidate: Plain, before: float) -> None:
    found = told(reference, [candidate])
    blocks = sum(isinstance(source, Blocks) for source in (reference, candidate))
    assert len(found) == 10 * blocks + 4 and found == sorted(found) and found[-1] == pytest.approx(1)
    if blocks:
        assert found[10 * blocks - 1] == pytest.approx(before * WORK_BEFORE)
        assert max(np.diff(found)) < 0.3, "it never stands still for long"


def test_one_source_that_is_both_is_watched_once() -> None:
    same = Blocks()
    assert told(same, [same])[-1] == pytest.approx(1) and same.watch is None


def test_what_lay_on_disk_takes_no_part_of_the_bar() -> None:
    """A source that is watched and has nothing to do."""
    silent = Blocks()
    silent.logits = Plain.logits.__get__(silent)  # type: ignore[method-assign]
    assert told(silent, [Plain()]) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_tails() -> None:
    found: list[float] = []
    source = Blocks()
    assert len(list(tails(source, list(WINDOWS), [2] * 4, found.append))) == 4
    assert len(found) == 14 and found == sorted(found) and found[9] == pytest.approx(WORK_BEFORE) and found[-1] == 1
    assert source.watch is None
