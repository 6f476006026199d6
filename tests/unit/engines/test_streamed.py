"""The streamed source: rows that nobody reads are left out, progress moves before the first row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.engines.streamed import StreamedSource
from compress.engines.transformers import TransformersSource, whole_model
from compress.models.checkpoint import Checkpoint
from compress.models.spec import load_spec
from compress.scoring.source import Generates, LogitSource, Tails, Watched, generator, tails
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


def streamed(folder: Path, **more: object) -> StreamedSource:
    checkpoint = Checkpoint.open(str(folder))
    return StreamedSource(load_spec(checkpoint.config), checkpoint.load, "original", **more)


def test_tails_are_the_last_rows(folder: Path) -> None:
    rng = np.random.default_rng(0)
    source: LogitSource
    for source in (streamed(folder), TransformersSource(folder)):
        assert isinstance(source, LogitSource) and isinstance(source, Tails)
        sequences = [rng.integers(0, source.vocab_size, length) for length in (9, 9, 7, 3)]
        whole, some = list(source.logits(sequences)), list(tails(source, sequences, [2, 1, 7, 1]))
        for rows, last, count in zip(whole, some, [2, 1, 7, 1], strict=True):
            assert last.shape == (count, source.vocab_size)
            np.testing.assert_allclose(last, rows[-count:], atol=1e-5)


def test_progress_moves_while_blocks_are_walked(folder: Path) -> None:
    source, seen = streamed(folder), []
    assert isinstance(source, Watched)
    rows = tails(source, [np.arange(1, 9)] * 3, [1, 1, 1], seen.append)
    next(rows)
    assert len(seen) >= source.spec.layers and seen[-1] == pytest.approx(0.9)
    list(rows)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and source.watch is None


def test_what_continues_text(folder: Path) -> None:
    assert generator(streamed(folder)) is None
    assert whole_model(folder, 10**12) is None  # too large to be held whole
    found = generator(streamed(folder, generator=whole_model(folder, 1000)))
    assert isinstance(found, Generates) and len(found.continuation(np.arange(1, 5), 3, lambda ids: False)) <= 3
