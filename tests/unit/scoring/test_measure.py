"""A suite of several texts: each scored as it would be alone, the first one's scores in front."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from compress.scoring.divergence import score
from compress.scoring.measure import measure
from compress.text import PROTOCOLS, Suite, SuiteText, eval_windows, load_suite
from tests.unit.scoring.test_divergence import Fixed
from tests.unit.text.test_text import Characters

VOCABULARY = 128


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    for name, words in (("one", "the cat sat on the mat "), ("two", "colourless green ideas sleep ")):
        (tmp_path / f"{name}.txt").write_text(words * 200)
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"name: both\ntexts:\n  {tmp_path / 'one.txt'}: {{windows: 6, length: 32}}\n"
        f"  second: {{text: {tmp_path / 'two.txt'}, length: 48, protocol: llama-perplexity}}\n"
    )
    return load_suite(str(path))


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))


def test_every_text_is_scored_as_alone(suite: Suite, tmp_path: Path) -> None:
    original, variant = Fixed(table(0), "original"), Fixed(table(1), "variant")
    progress: list[float] = []
    found = measure(variant, original, suite, Characters(), label="m", max_positions=64, progress=progress.append)
    assert list(found.texts) == list(found.base_texts) == ["one.txt", "second"]  # not where they lie
    assert found.scores is found.texts["one.txt"] and found.base_scores is found.base_texts["one.txt"]
    windows = eval_windows(str(tmp_path / "two.txt"), Characters(), length=48, protocol=PROTOCOLS["llama-perplexity"])
    assert found.texts["second"] == score(original, variant, windows, tokenizer="m")[0]
    assert found.base_texts["second"].perplexity == found.texts["second"].base_perplexity
    assert (found.texts["second"].text, found.texts["second"].protocol) == ("two.txt", "llama-perplexity")
    assert found.texts["second"].tokens == len(windows.tokens) * 23
    assert (
        progress == sorted(progress) and progress[-1] == pytest.approx(1.0) and len(progress) == 6 + len(windows.tokens)
    )
    share = 6 * 32 / (6 * 32 + windows.tokens.size)
    assert progress[5] == pytest.approx(share)


def test_each_text_has_its_own_doubt(suite: Suite) -> None:
    """A model of the first text only: sure of what never comes in the second."""
    sure = np.zeros((VOCABULARY, VOCABULARY))
    for a, b in zip("the cat sat on the mat", "he cat sat on the mat ", strict=True):
        sure[ord(a), ord(b)] = 20.0
    sure[ord(" "), ord("t")] = sure[ord("\0"), ord("t")] = 20.0
    found = measure(Fixed(sure), Fixed(sure, "original"), suite, Characters(), label="m", max_positions=64)
    (doubt,) = found.doubts
    assert "cannot predict this text (second)" in doubt


def test_words_and_bytes_share_one_total(tmp_path: Path) -> None:
    """The total of nats over words or bytes, by hand; a reference's beside it."""
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 100)
    windows = eval_windows(str(path), Characters(), length=20)
    scores, _ = score(Fixed(table(2)), Fixed(table(3)), windows)
    for logits, names in ((table(3), ("word_perplexity", "byte_perplexity")), (table(2), ("base_word_perplexity", "base_byte_perplexity"))):  # fmt: skip
        logits = logits.astype(np.float32).astype(float)
        chance = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        nats = -chance[windows.tokens[:, :-1], windows.tokens[:, 1:]].sum()
        spelled = [("".join(map(chr, row[:1])), "".join(map(chr, row[1:]))) for row in windows.tokens]
        words = sum(len((a + b).split()) - len(a.split()) for a, b in spelled)
        size = sum(len(b.replace("\0", "")) for _, b in spelled)
        per_word, per_byte = (getattr(scores, name) for name in names)
        # where a window begins between two words, only the text before it tells whether its first token begins one
        assert per_word.value == pytest.approx(math.exp(nats / words), rel=0.2)
        assert per_byte.value == pytest.approx(math.exp(nats / size), rel=1e-9)
        assert per_byte.low < per_byte.value < per_byte.high
    alone = scores.of_reference()
    assert alone.word_perplexity == scores.base_word_perplexity and alone.base_byte_perplexity is None
    assert score(None, Fixed(table(2)), windows.tokens)[0].word_perplexity is None


def test_suites_are_values() -> None:
    assert SuiteText("wikipedia") == SuiteText("wikipedia", None, PROTOCOLS["default"])
