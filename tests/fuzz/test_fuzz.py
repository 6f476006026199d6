"""A few hundred cases of every fuzzer; `make soak` runs thousands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.harness import attempt, limited
from tests.fuzz.soak import SOURCES, fuzz


@pytest.mark.parametrize(("source", "count"), [("recipes", 150), ("checkpoints", 200), ("runs", 6)])
def test_nothing_but_errors_in_words(source: str, count: int) -> None:
    kinds, prepare = SOURCES[source]
    prepare()
    assert not [str(failure) for failure in fuzz(kinds, count)]


def test_the_harness_sees_what_it_is_there_for(tmp_path: Path) -> None:
    def raises(*_: object) -> None:
        {}["key"]

    def hangs(*_: object) -> None:
        with limited(wait=0.05):
            time.sleep(5)

    def spins(*_: object) -> None:
        with limited(0.05):
            while True:
                pass

    def floods(*_: object) -> None:
        from compress.errors import RecipeError

        raise RecipeError(["x"] * 1000)

    assert "KeyError at test_fuzz.py" in str(attempt("a", raises, 3, tmp_path))
    assert "took more" in str(attempt("a", hangs, 3, tmp_path)) and "took more" in str(attempt("a", spins, 3, tmp_path))
    assert "1000 lines" in str(attempt("a", floods, 3, tmp_path))
    assert attempt("a", lambda *_: None, 3, tmp_path) is None
