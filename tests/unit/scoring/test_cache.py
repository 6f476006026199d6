"""A remembered original: the same scores as a computed one, and no second pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from compress.files import fingerprint
from compress.scoring import cache
from compress.scoring.cache import Remembered
from compress.scoring.divergence import score
from compress.scoring.results import Fallback
from compress.scoring.tasks import Outcomes, load_tasks
from compress.text import EvalWindows, TaskChoice

VOCABULARY, WINDOWS, LENGTH = 700, 4, 60


class Random:
    """A model whose logits are drawn from a seed and the tokens; counts what it is asked."""

    name, vocab_size = "random", VOCABULARY

    def __init__(self, seed: int, off: float = 0.0):
        self.seed, self.off, self.asked = seed, off, 0

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for sequence in sequences:
            self.asked += 1
            rng = np.random.default_rng([self.seed, *sequence])
            logits = 3 * rng.standard_normal((len(sequence), VOCABULARY))
            yield (logits + self.off * rng.standard_normal(logits.shape)).astype(np.float32)


@pytest.fixture
def windows(tmp_path, monkeypatch) -> EvalWindows:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    return EvalWindows.of(np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, LENGTH)))


def test_a_second_variant_costs_no_pass_of_the_original(windows):
    first, second = Random(1), Random(1)
    direct, _ = score(Random(1), Random(1, 0.3), windows)
    found, _ = score(Remembered(first, "model"), Random(1, 0.3), windows)
    again, _ = score(Remembered(second, "model"), Random(1, 0.3), windows)
    assert first.asked == WINDOWS and second.asked == 0
    assert found == again and found.kept_tokens is None
    assert found.kld.mean == pytest.approx(direct.kld.mean, rel=1e-6)
    assert found.base_perplexity.value == pytest.approx(direct.base_perplexity.value, rel=1e-8)
    assert found.top1_agreement == direct.top1_agreement


def test_few_tokens_of_each_place(windows, monkeypatch):
    monkeypatch.setattr(cache, "TEXT_BYTES", 1)
    direct, _ = score(Random(1), Random(1, 0.3), windows)
    found, _ = score(Remembered(Random(1), "model"), Random(1, 0.3), windows)
    assert found.kept_tokens == 256
    assert found.kld.mean == pytest.approx(direct.kld.mean, rel=5e-3)


def test_what_is_damaged_or_missing_is_computed_again(windows, tmp_path):
    found, _ = score(Remembered(Random(1), "model"), Random(1, 0.3), windows)
    files = sorted(tmp_path.rglob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[2].unlink()
    source = Random(1)
    assert score(Remembered(source, "model"), Random(1, 0.3), windows)[0] == found
    assert source.asked == 2
    assert len(list(tmp_path.rglob("*.npz"))) == WINDOWS


def test_other_models_and_other_text_are_not_mistaken_for_it(windows):
    score(Remembered(Random(1), "model"), Random(1, 0.3), windows)
    other, text = Random(2), Random(1)
    score(Remembered(other, "another model"), Random(1, 0.3), windows)
    score(Remembered(text, "model"), Random(1, 0.3), EvalWindows.of(windows.tokens[:, ::-1]))
    assert other.asked == text.asked == WINDOWS


def test_a_changed_file_has_another_fingerprint(tmp_path):
    (file := tmp_path / "weights").write_bytes(b"one")
    before = fingerprint([file])
    assert fingerprint([file]) == before
    file.write_bytes(b"another")
    assert fingerprint([file]) != before


def test_answers_are_remembered_to_the_bit(windows, tmp_path):
    outcomes = Outcomes(np.array([0, 3]), {"acc": np.array([1.0, 0.0])}, ("a", "b"), ("1", "0"), "Task")
    line = Fallback(subject="tasks", wanted="gsm8k", used="not scored", reason="offline")
    asked = []

    def compute():
        asked.append(1)
        return {"task": outcomes}, [line]

    original = Remembered(Random(1), "model")
    first = original.answers("question", compute)
    found, lines = Remembered(Random(1), "model").answers("question", compute)
    assert len(asked) == 1 and lines == [line] == first[1]
    assert found["task"].saved() == outcomes.saved()
    original.answers("another question", compute)
    Remembered(Random(1), "another model").answers("question", compute)
    assert len(asked) == 3
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text()[:-9])
    assert original.answers("question", compute)[1] == [line] and len(asked) == 4


def test_what_is_asked_has_a_digest():
    pytest.importorskip("lm_eval")

    def digest(name: str, documents: int, **choice: object) -> str:
        ((task,), _) = load_tasks({name: TaskChoice(documents=documents, **choice)})
        return task.digest

    assert digest("blimp", 4) == digest("blimp", 4)
    assert len({digest("blimp", 4), digest("blimp", 5), digest("lambada", 4), digest("lambada", 4, fewshot=1)}) == 4
