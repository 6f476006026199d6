"""Task accuracy through the LogitSource adapter, against lm-eval's own model class and direct sums."""

from __future__ import annotations

import builtins
import json
import logging
import math
import shutil
import socket
from itertools import takewhile
from pathlib import Path

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
from compress.scoring.divergence import score  # noqa: E402
from compress.scoring.source import LogitSource  # noqa: E402
from compress.scoring.tasks import AskedTask, Outcomes, load_tasks, task_outcomes, task_scores  # noqa: E402
from compress.scoring.tasks.adapter import _adapter, answer, logit_source_lm  # noqa: E402
from compress.scoring.tasks.load import draw  # noqa: E402
from compress.scoring.tasks.quiet import quiet  # noqa: E402
from compress.text import TaskChoice, data_root, load_tokenizer, task_documents  # noqa: E402

MODEL = data_root("models") / "tiny-qwen3-moe"
FEW = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "boolq", "winogrande", "refusals")
COUNTS = {"blimp": 67, "lambada": 40, **dict.fromkeys(FEW, 3), "sums": 3}


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


def asked(**documents: int | TaskChoice) -> list[AskedTask]:
    """Tasks that can all be asked."""
    choices = {name: TaskChoice(count) if isinstance(count, int) else count for name, count in documents.items()}
    found, lines = load_tasks(choices)
    assert not lines
    return found


@pytest.fixture(scope="module")
def ready() -> list[AskedTask]:
    return asked(**COUNTS)


@pytest.fixture(scope="module")
def outcomes(source, tokenizer, ready):
    found, lines = task_outcomes(source, tokenizer, ready, max_length=2048)
    assert not lines and list(found) == list(COUNTS)
    return found


def test_same_answers_as_lm_evals_own_model(source, tokenizer, ready, outcomes):
    """All metrics of every document, and the very texts that are generated."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=source.model, tokenizer=tokenizer, batch_size=1)
    parts = {name: task for entry in ready for name, task in entry.parts.items()}
    for part in parts.values():
        part.set_fewshot_seed(1234)
    with quiet():
        results = evaluate(
            theirs,
            {"tasks": parts},
            samples={name: places for entry in ready for name, places in entry.documents.items()},
            bootstrap_iters=0,
        )
    for name, ours in outcomes.items():
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == ours.documents.tolist()
        assert set(samples[0]["metrics"]) == set(ours.values)
        for metric, values in ours.values.items():
            assert [sample[metric] for sample in samples] == pytest.approx(values.tolist(), abs=1e-3)
            reported = results["results"][name][f"{metric},{samples[0]['filter']}"]
            if metric != "perplexity":
                assert reported == pytest.approx(values.mean())
    assert [sample["resps"][0][0] for sample in results["samples"]["sums"]] != ["", "", ""]
    answers = [sample["filtered_resps"][0] for sample in results["samples"]["sums"]]
    assert outcomes["sums"].answers == tuple(answers)
    row = task_scores(outcomes)["lambada.perplexity"]
    assert row.value == pytest.approx(results["results"]["lambada"]["perplexity,none"], rel=1e-4)


def hub_row(name: str, row: dict) -> dict:
    """A bundled document in the shape of the hub's set."""
    letters = list("ABCD")
    if name.startswith("arc"):
        return {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": letters},
            "answerKey": letters[row["answer"]],
        }
    if name == "openbookqa":
        return {
            "question_stem": row["question_stem"],
            "choices": {"text": row["choices"], "label": letters},
            "answerKey": letters[row["answer"]],
        }
    if name == "hellaswag":
        label, _, rest = row["query"].partition(": ")
        return {
            "activity_label": label,
            "ctx_a": rest,
            "ctx_b": "",
            "endings": row["choices"],
            "label": str(row["gold"]),
        }
    if name == "winogrande":
        one, two = row["contexts"]
        shared = sum(
            len(a) + 1
            for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.split(" "), two.split(" "), strict=False))
        )
        return {
            "sentence": f"{one[:shared]}_ {row['ending']}",
            "option1": one[shared:],
            "option2": two[shared:],
            "answer": str(row["answer"] + 1),
        }
    return row


@pytest.mark.parametrize("name", [name for name in FEW if name != "refusals"])
def test_requests_are_those_of_lm_evals_own_task(name, monkeypatch):
    """lm-eval's own definition, given the documents as the hub has them, asks what ours asks."""
    import datasets

    rows = datasets.Dataset.from_list([hub_row(name, row) for row in task_documents(name)])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"test": rows, "validation": rows, "train": rows})
    monkeypatch.setattr("huggingface_hub.utils.get_session", refuse)
    ours, theirs = asked(**{name: 5}), asked(**{name: TaskChoice(5, hub=True)})
    requests = []
    for (entry,) in (ours, theirs):
        part = entry.parts[name]
        assert part.get_config("dataset_path") is (None if not requests else part.DATASET_PATH)
        with quiet():
            part.set_config("num_fewshot", 0)
            part.build_all_requests(samples=entry.documents[name])
        requests.append([(instance.args, instance.request_type) for instance in part.instances])
        requests.append([part.doc_to_target(instance.doc) for instance in part.instances])
        requests.append(list(part._metric_fn_list))
    assert requests[:3] == requests[3:]


def test_likelihoods_are_the_direct_sums(source, tokenizer, ready, outcomes):
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
        assert bool(good > bad) == outcomes["blimp"].values["acc"][index]
    passages = task_documents("lambada")
    for index, place in enumerate(outcomes["lambada"].documents[:10]):
        document = passages[place]
        context = tokenizer.encode(document["context"])
        target = tokenizer.encode(document["context"] + " " + document["continuation"])[len(context) :]
        assert total(context, target) == pytest.approx(outcomes["lambada"].values["perplexity"][index], abs=1e-3)


def test_documents_are_drawn_within_each_other_and_spread():
    few, more = draw("arc_easy", 1000, 50), draw("arc_easy", 1000, 200)
    assert set(few) < set(more) and len(set(more)) == 200 and more == sorted(more)
    assert 350 < np.mean(more) < 650 and max(few) > 800
    assert draw("arc_easy", 1000, 1000) is None and draw("blimp", 1340, 3, ordered=True) == [0, 1, 2]
    (task,) = asked(blimp=134)
    assert task.documents["blimp"] == list(range(134))  # twice round the phenomena


def test_rows(outcomes):
    rows = task_scores(outcomes)
    assert rows["blimp"].n == 67 and rows["lambada"].n == 40 and rows["blimp"].title == "BLiMP"
    parts = [row for name, row in rows.items() if name.startswith("blimp.")]
    assert sum(row.n for row in parts) == 67 and all(row.group for row in parts)
    assert sum(row.n * row.value for row in parts) == pytest.approx(67 * rows["blimp"].value)
    assert all(row.low <= row.value <= row.high for row in rows.values())
    assert rows["arc_challenge"].metric == "acc_norm" and rows["arc_challenge.acc"].metric == "acc"
    assert [name for name, row in rows.items() if not row.is_share] == ["lambada.perplexity"]
    assert all(row.flips is None and row.difference is None for row in rows.values())


def test_outcomes_survive_a_file(outcomes):
    again = {name: Outcomes.restored(json.loads(json.dumps(found.saved()))) for name, found in outcomes.items()}
    assert task_scores(again, outcomes) == task_scores(outcomes, again)
    assert all(
        row.flips is None or row.flips.changed in (None, row.flips.lost)
        for row in task_scores(again, outcomes).values()
    )


def refuse(*_, **__):
    raise AssertionError("tried to reach the network")


def test_offline_silent_and_tidy(source, tokenizer, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    level = logging.getLogger("lm_eval").level
    ticks = []
    task_outcomes(source, tokenizer, asked(blimp=2), progress=ticks.append)
    assert ticks == [0.25, 0.5, 0.75, 1.0]
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
    got = answer(source, pairs)
    want = [logp[1, 2] + logp[2, 3], logp[1, 2], logp[4, best], logp[4, (best + 1) % 8]]
    assert [value for value, _ in got] == pytest.approx(want, rel=1e-6)
    assert got[2][1] is True and got[3][1] is False
    # longest first, the shared context once, the last token never sent
    assert source.seen == [[5, 6, 7, 1], [1, 2], [3, 4]]


def test_answers_of_limited_models_lose_their_beginning():
    source = Table(np.zeros((9, 9)))
    answer(source, [([1, 2, 3, 4], [5, 6])], max_length=3)
    assert source.seen == [[3, 4, 5]]
    with pytest.raises(CalibrationError, match="limit of 1"):
        answer(source, [([1], [2, 3])], max_length=1)


def test_bad_requests_and_logits():
    with pytest.raises(CalibrationError, match="token id 9"):
        answer(Table(np.zeros((9, 9))), [([1], [9])])
    with pytest.raises(NumericalError, match="table"):
        answer(Table(np.full((9, 9), math.nan)), [([1], [2])])
    with pytest.raises(
        RecipeError, match="unknown task 'gsm8kk' .did you mean 'gsm8k'.*; bundled are arc_challenge, .*, blimp"
    ):
        load_tasks({"gsm8kk": TaskChoice(3)})
    assert load_tasks({}) == ([], []) and task_outcomes(Table(np.zeros((9, 9))), None, []) == ({}, [])


def test_missing_lm_eval_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **keywords):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **keywords)

    _adapter.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"compress-llm\[eval\]"):
        logit_source_lm(Table(np.zeros((9, 9))), None)


def test_tasks_without_lm_eval_are_a_line(monkeypatch):
    monkeypatch.setattr("compress.scoring.tasks.load.find_spec", lambda name: None)
    found, (line,) = load_tasks({"blimp": TaskChoice(1), "gsm8k": TaskChoice(1)})
    assert found == [] and line.wanted == "blimp, gsm8k" and "compress-llm[eval]" in line.reason


def test_hub_tasks_out_of_reach_are_one_line_and_the_rest_is_scored(source, tokenizer, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    names = ("gsm8k", "blimp", "truthfulqa_mc1", "wmdp")
    found, (line,) = load_tasks({name: TaskChoice(2) for name in names})
    assert [task.name for task in found] == ["blimp"] and capfd.readouterr() == ("", "")
    assert line.wanted == "gsm8k, truthfulqa_mc1, wmdp" and "hub cannot be reached" in line.reason


# ---------------------------------------------------------------- chat, groups, generated answers


def copied(folder: Path, template: str | None) -> Path:
    """The demo model's tokenizer with another chat template, or with none."""
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(MODEL / file, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("own", [None, "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"])
def test_chat_prompts_are_those_of_transformers(source, own, tmp_path):
    from lm_eval.models.huggingface import HFLM

    folder = MODEL if own is None else copied(tmp_path, own)
    theirs = HFLM(pretrained=source.model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))
    ours = logit_source_lm(source, load_tokenizer(folder))
    talk = [{"role": "user", "content": "How much? "}, {"role": "assistant", "content": "It is "}]
    for messages, prompt in ((talk, False), (talk[:1], True), (talk, True)):
        assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(messages, prompt)
    seen = []
    (task,) = asked(arc_easy=TaskChoice(3, fewshot=2, chat=True))
    for model in (ours, theirs):
        part = task.parts["arc_easy"]
        part.set_fewshot_seed(1234)
        with quiet():
            part.build_all_requests(
                samples=task.documents["arc_easy"], apply_chat_template=True, fewshot_as_multiturn=True,
                chat_template=model.apply_chat_template, tokenizer_name="",
            )  # fmt: skip
        seen.append([instance.args for instance in part.instances])
    assert seen[0] == seen[1] and seen[0][0][0].count("assistant") == 2 + (own is None)


def test_chat_is_asked_where_there_is_a_template(source, tmp_path):
    tasks = asked(arc_easy=TaskChoice(2, chat=True), piqa=TaskChoice(2))
    without, (line,) = task_outcomes(source, load_tokenizer(copied(tmp_path, None)), tasks)
    assert (line.wanted, line.used) == ("arc_easy as chat", "plain text")
    ticks = []
    found, lines = task_outcomes(source, load_tokenizer(MODEL), tasks, progress=ticks.append)
    assert not lines and list(found) == ["arc_easy", "piqa"] and list(without) == ["arc_easy", "piqa"]
    assert ticks == sorted(ticks) and ticks[-1] == pytest.approx(1.0)


def test_examples_are_the_same_for_every_model(source, tokenizer):
    tasks = asked(piqa=TaskChoice(2, fewshot=2))
    asked_twice = []
    for _ in range(2):
        table = Table(np.zeros((source.vocab_size, 4)).repeat(source.vocab_size // 4 + 1, axis=1))
        task_outcomes(table, tokenizer, tasks)
        asked_twice.append(table.seen)
    assert asked_twice[0] == asked_twice[1] and min(map(len, asked_twice[0])) > 60


def test_a_task_of_ones_own_and_a_group(tmp_path, source, tokenizer):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{i} and", "good": " one", "bad": " xq"}) + "\n" for i in range(6))
    )
    (tmp_path / "own.yaml").write_text(OWN.format(rows=tmp_path / "rows.jsonl", task="own"))
    own, left, right = (asked(**{str(tmp_path / "own.yaml"): 4})[0] for _ in range(3))
    parts = {"left": left.parts["own"], "right": right.parts["own"]}
    pair = AskedTask("pair", own.choice, parts, {"left": [0, 2], "right": [1, 2]})
    found, lines = task_outcomes(source, tokenizer, [own, pair])
    assert not lines and list(found) == ["own", "pair"]
    assert found["pair"].documents.tolist() == [0, 2, 7, 8] and found["pair"].groups == (
        "left",
        "left",
        "right",
        "right",
    )
    assert found["own"].values["acc"].tolist() == [1.0] * 4
    with pytest.raises(CalibrationError, match="two tasks are called own"):
        shutil.copy(tmp_path / "own.yaml", tmp_path / "again.yaml")
        load_tasks({str(tmp_path / "own.yaml"): TaskChoice(1), str(tmp_path / "again.yaml"): TaskChoice(1)})
    with pytest.raises(CalibrationError, match="not a task that lm-eval can load"):
        (tmp_path / "own.yaml").write_text("task: own\n")
        load_tasks({str(tmp_path / "own.yaml"): TaskChoice(1)})
    with pytest.raises(RecipeError, match="no task file"):
        load_tasks({str(tmp_path / "nothing.yaml"): TaskChoice(1)})


OWN = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{rows}'}}}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: '{{{{[good, bad]}}}}'
doc_to_target: 0
target_delimiter: ''"""


def test_generated_answers_need_an_engine(source, tokenizer):
    tasks = asked(blimp=2, sums=2)
    found, (line,) = task_outcomes(Table(np.zeros((source.vocab_size, source.vocab_size))), tokenizer, tasks)
    assert list(found) == ["blimp"] and line.wanted == "sums" and "needs an engine; table has none" in line.reason


def test_continuation_is_what_transformers_generates(source):
    prompt = np.arange(5, 25)
    with torch.inference_mode():
        out = source.model.generate(torch.tensor(prompt)[None], max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    assert source.continuation(prompt, 12, lambda ids: False) == out
    assert source.continuation(prompt, 12, lambda ids: len(ids) == 5) == out[:5]
    end = source.model.generation_config.eos_token_id
    source.model.generation_config.eos_token_id = [out[3], 0]
    assert source.continuation(prompt, 12, lambda ids: False) == out[: out.index(out[3])]
    source.model.generation_config.eos_token_id = end


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
