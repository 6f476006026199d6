"""Task accuracy through the LogitSource adapter, against lm-eval's own model class and direct sums."""

from __future__ import annotations

import builtins
import json
import logging
import math
import shutil
import socket

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from compress.engines.transformers import TransformersSource
from compress.errors import (  # noqa: E402
    CalibrationError,
    CheckpointError,
    MissingExtra,
    NumericalError,
    RecipeError,
)
from compress.scoring import tasks  # noqa: E402
from compress.scoring.divergence import score  # noqa: E402
from compress.scoring.source import LogitSource  # noqa: E402
from compress.text import data_root, task_documents  # noqa: E402

MODEL = data_root("models") / "tiny-qwen3-moe"
COUNTS = {"blimp": 67, "lambada": 40}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only lose by sharing them out, and badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source() -> TransformersSource:
    return TransformersSource(MODEL, name="original")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def outcomes(source, tokenizer):
    return tasks.task_outcomes(source, tokenizer, COUNTS)


def test_same_answers_as_lm_evals_own_model(source, tokenizer, outcomes):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=source.model, tokenizer=tokenizer, batch_size=16)
    with tasks._quiet():
        loaded = TaskManager(include_path=str(data_root("eval") / "tasks"), include_defaults=False).load(list(COUNTS))
        results = evaluate(
            theirs, loaded, samples={name: list(range(n)) for name, n in COUNTS.items()}, bootstrap_iters=0
        )
    for name, ours in outcomes.items():
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        assert [bool(sample["acc"]) for sample in samples] == ours.correct.tolist()
        assert results["results"][name]["acc,none"] == pytest.approx(ours.correct.mean())
    likelihood = [s["perplexity"] for s in sorted(results["samples"]["lambada"], key=lambda s: s["doc_id"])]
    assert outcomes["lambada"].log_likelihood == pytest.approx(likelihood, abs=1e-3)
    row = tasks.summarise(outcomes)["lambada.perplexity"]
    assert row["value"] == pytest.approx(results["results"]["lambada"]["perplexity,none"], rel=1e-4)


def test_likelihoods_are_the_direct_sums(source, tokenizer, outcomes):
    bos = tokenizer.eos_token_id  # this tokenizer has no BOS

    def total(context: list[int], target: list[int]) -> float:
        with torch.inference_mode():
            logits = source.model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(target))

    for index, document in enumerate(task_documents("blimp", 20)):
        good, bad = (
            total([bos], tokenizer.encode(" " + document[key], add_special_tokens=False))
            for key in ("sentence_good", "sentence_bad")
        )
        assert bool(good > bad) == outcomes["blimp"].correct[index]
    for index, document in enumerate(task_documents("lambada", 10)):
        context = tokenizer.encode(document["context"])
        target = tokenizer.encode(document["context"] + " " + document["continuation"])[len(context) :]
        assert total(context, target) == pytest.approx(outcomes["lambada"].log_likelihood[index], abs=1e-3)


def test_rows(outcomes):
    rows = tasks.summarise(outcomes)
    assert {"metric", "value", "low", "high", "n"} == set(rows["blimp"])
    assert rows["blimp"]["n"] == 67 and rows["lambada"]["n"] == 40
    parts = [row for name, row in rows.items() if name.startswith("blimp.")]
    assert sum(row["n"] for row in parts) == 67
    assert sum(row["n"] * row["value"] for row in parts) == pytest.approx(67 * rows["blimp"]["value"])
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    json.dumps(rows, allow_nan=False)


def test_offline_silent_and_tidy(source, tokenizer, monkeypatch, capfd, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    level = logging.getLogger("lm_eval").level
    ticks = []
    tasks.run_tasks(source, tokenizer, {"blimp": 2}, progress=lambda done, total: ticks.append((done, total)))
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    assert not list(tmp_path.iterdir())


class Table:
    """Next-token logits that depend on the last token only; counts the sequences it is asked for."""

    name = "table"

    def __init__(self, table: np.ndarray):
        self.table, self.vocab_size, self.seen = table.astype(np.float32), table.shape[1], []

    def logits(self, sequences):
        for sequence in sequences:
            self.seen.append(sequence.tolist())
            yield self.table[sequence]


def test_answers_by_hand():
    rng = np.random.default_rng(0)
    source = Table(rng.normal(size=(8, 8)))
    assert isinstance(source, LogitSource)
    logp = source.table - np.log(np.exp(source.table.astype(float)).sum(1, keepdims=True))
    best = int(source.table[4].argmax())
    pairs = [([1], [2, 3]), ([5, 6, 7, 1], [2]), ([3, 4], [best]), ([3, 4], [(best + 1) % 8])]
    got = tasks.answer(source, pairs)
    want = [logp[1, 2] + logp[2, 3], logp[1, 2], logp[4, best], logp[4, (best + 1) % 8]]
    assert [value for value, _ in got] == pytest.approx(want, rel=1e-6)
    assert got[2][1] is True and got[3][1] is False
    # longest first, the shared context once, the last token never sent
    assert source.seen == [[5, 6, 7, 1], [1, 2], [3, 4]]


def test_answers_of_limited_models_lose_their_beginning():
    source = Table(np.zeros((9, 9)))
    tasks.answer(source, [([1, 2, 3, 4], [5, 6])], max_length=3)
    assert source.seen == [[3, 4, 5]]
    with pytest.raises(CalibrationError, match="limit of 1"):
        tasks.answer(source, [([1], [2, 3])], max_length=1)


def test_bad_requests_and_logits():
    with pytest.raises(CalibrationError, match="token id 9"):
        tasks.answer(Table(np.zeros((9, 9))), [([1], [9])])
    with pytest.raises(NumericalError, match="table"):
        tasks.answer(Table(np.full((9, 9), math.nan)), [([1], [2])])
    with pytest.raises(RecipeError, match="bundled tasks are: blimp, lambada"):
        tasks.run_tasks(Table(np.zeros((9, 9))), None, {"mmlu": 3})
    assert tasks.run_tasks(Table(np.zeros((9, 9))), None, {}) == {}


def test_missing_lm_eval_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **keywords):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **keywords)

    tasks._adapter.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"compress-llm\[eval\]"):
        tasks.run_tasks(Table(np.zeros((9, 9))), None, {"blimp": 1})


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes, count, low, high):
    assert tasks.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference_of_accuracies():
    def outcome(correct):
        return tasks.Outcomes(np.arange(len(correct)), np.array(correct, bool))

    same = tasks.compare(outcome([1] * 30 + [0] * 10), outcome([1] * 30 + [0] * 10))
    assert same["value"] == 0 and same["low"] < 0 < same["high"]  # no change seen is not proof of none
    worse = tasks.compare(outcome([1] * 10 + [0] * 30), outcome([1] * 30 + [0] * 10))
    assert worse["value"] == -0.5 and worse["high"] < 0
    # Agresti and Min (2005): cells 20.5 and 0.5 of 42
    half = 1.959964 * math.sqrt(21 - 20**2 / 42) / 42
    assert (worse["low"], worse["high"]) == pytest.approx((-20 / 42 - half, -20 / 42 + half), abs=1e-6)
    with pytest.raises(ValueError, match="same documents"):
        tasks.compare(outcome([1]), outcome([1, 0]))


def test_paired_interval_covers():
    rng = np.random.default_rng(0)
    probabilities = [0.5, 0.1, 0.06, 0.34]  # both right, gained, lost, both wrong: true difference 0.04
    covered = 0
    for _ in range(1000):
        kind = rng.choice(4, 200, p=probabilities)
        documents = np.arange(200)
        result = tasks.compare(
            tasks.Outcomes(documents, np.isin(kind, (0, 1))), tasks.Outcomes(documents, np.isin(kind, (0, 2)))
        )
        covered += result["low"] <= 0.04 <= result["high"]
    assert 0.93 < covered / 1000 < 0.975


# ---------------------------------------------------------------- the transformers source


def test_source_batches_equal_lengths_and_keeps_order(source, monkeypatch):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, source.vocab_size, n) for n in (5, 5, 9, 5, 3, 3, 3)]
    together = list(source.logits(sequences))
    monkeypatch.setattr("compress.engines.transformers.BATCH_LOGIT_BYTES", 1)
    alone = list(source.logits(sequences))
    for sequence, a, b in zip(sequences, together, alone, strict=True):
        assert a.shape == (len(sequence), source.vocab_size) and a.dtype == np.float32
        assert a == pytest.approx(b, abs=2e-4)
    itself, _ = score(source, source, np.stack(sequences[:2]))
    assert itself.kld.max < 1e-9


def test_source_refuses_sequences_beyond_the_model(source):
    with pytest.raises(CalibrationError, match="2049 tokens"):
        next(source.logits([np.zeros(2049, int)]))


@pytest.mark.parametrize("suffix", ["o_proj.weight", "experts.3.up_proj.weight", "norm.weight"])
def test_source_refuses_a_checkpoint_with_holes(tmp_path, suffix):
    from safetensors.torch import load_file, save_file

    for file in ("config.json", "generation_config.json"):
        shutil.copy(MODEL / file, tmp_path)
    tensors = load_file(MODEL / "model.safetensors")
    victim = next(name for name in tensors if name.endswith(suffix))
    del tensors[victim]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        TransformersSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_source_names_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        TransformersSource(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="config.json"):
        TransformersSource(tmp_path)
