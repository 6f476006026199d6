"""compress chat and generate: what the model is asked, held against transformers' template, ids and greedy search."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.engines.sampling import Sampling, chooser
from tests.integration.runs import carry_out, command, small
from tests.tiny import tiny_model

RECIPE = "{name: talk, model: nowhere, steps: [], export: [{container: CONTAINER}]}"
SYSTEM, QUESTIONS = "Be brief.", ("Who are you?", "And why?")
TOKENS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of float32 weights, and the same in a GGUF."""
    place = tmp_path_factory.mktemp("talk")
    tiny_model("llama", place / "model")
    (place / "talk.yaml").write_text(RECIPE.replace("CONTAINER", "gguf"))
    carry_out(small(place / "talk.yaml", place / "model", place / "gguf"))
    return place


def linked(model: Path, folder: Path, *, without: str) -> None:
    """The files of a model in another folder, but for one."""
    for file in model.iterdir():
        if file.name != without:
            (folder / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def expected(place: Path) -> list[str]:
    """The answers of transformers alone: its template, its tokenizer, its greedy search."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    talk, answers = [{"role": "system", "content": SYSTEM}], []
    for question in QUESTIONS:
        talk.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(out, skip_special_tokens=True))
        talk.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("target", ["gguf/talk.gguf", "gguf", "model"])
def test_answers_are_those_of_transformers(
    place: Path, expected: list[str], target: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Two turns in a pipe: the second one goes on from what the engine holds of the first."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join((*QUESTIONS, "/exit", "never read"))))
    arguments = ("--system", SYSTEM, "--temp", "0", "-n", str(TOKENS))
    code, out, err = command(monkeypatch, capfd, "chat", str(place / target), *arguments)
    assert code == 0 and out == "".join(f"{answer}\n" for answer in expected)
    assert "fewer than --context" in err


def test_commands_of_a_talk(
    place: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    lines = ("something else", "/nonsense", "/help", f"/system {SYSTEM}", QUESTIONS[0], "/quit", "never read")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = command(monkeypatch, capfd, "chat", str(place / "gguf"), "--temp", "0", "-n", str(TOKENS))
    assert code == 0 and out.splitlines()[-1] == expected[0].splitlines()[-1] and len(out.splitlines()) >= 2
    assert "no command /nonsense" in err and "/reset" in err


def test_generate_asks_in_the_template(
    place: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    more = ("--chat", "--system", SYSTEM, "-n", str(TOKENS))
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTIONS[0] + "\n"))
    assert command(monkeypatch, capfd, "generate", str(place / "gguf"), *more)[:2] == (0, f"{expected[0]}\n")
    assert command(monkeypatch, capfd, "generate", str(place / "model"), QUESTIONS[0], *more)[:2] == (
        0,
        f"{expected[0]}\n",
    )


def test_draws_follow_the_seed(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    def said(seed: str) -> str:
        return command(monkeypatch, capfd, "generate", str(place / "gguf"), "x", "--temp", "1", "--seed", seed)[1]

    assert said("1") == said("1") != said("2")


def test_sampling_is_what_the_model_advises(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    linked(place / "model", tmp_path, without="generation_config.json")
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.3, "top_k": 7, "repetition_penalty": 1.1}'
    )
    used: list[Sampling] = []
    monkeypatch.setattr(
        "compress.engines.sampling.chooser", lambda sampling: used.append(sampling) or chooser(sampling)
    )
    for more in ((), ("--temp", "0", "--top-k", "5")):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert command(monkeypatch, capfd, "chat", str(tmp_path), "-n", "2", "--seed", "1", *more)[0] == 0
    assert used == [Sampling(0.3, 7, 0.95, 0.05, 1.1, 1), Sampling(0.0, 5, 0.95, 0.05, 1.1, 1)]


def test_what_cannot_talk_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    linked(place / "model", tmp_path, without="chat_template.jinja")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, _, err = command(monkeypatch, capfd, "chat", str(tmp_path))
    assert code == 1 and "no chat template" in err and err.count("\n") <= 2
    assert command(monkeypatch, capfd, "generate", str(tmp_path), "x", "--system", "y")[0] == 2
    assert "no GGUF file" in command(monkeypatch, capfd, "chat", str(tmp_path / "none.gguf"))[2]


def test_a_model_that_ends_at_once_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Every token ends a text here: nothing is said, and why is told."""
    linked(place / "model", tmp_path, without="generation_config.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(4096))}))
    code, out, err = command(monkeypatch, capfd, "generate", str(tmp_path), "x")
    assert (code, out) == (
        0,
        "x\n",
    ) and err == "note: the model ended at once; it has a chat template: ask with --chat\n"
