"""What `plan` reads: texts and tokenizer as a run will, no further, and nothing from the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.errors import CalibrationError, CheckpointError
from compress.plan import Plan, make_plan
from compress.plan.texts import read_texts
from compress.recipe import load_recipe
from tests.integration.runs import command
from tests.tiny import demo_model, tiny_model

TEXT = "The river runs through the old town, past the mill and under three bridges.\n"


def _read(model: Path, folder: Path, dataset: str, score: str = "false") -> list[str]:
    path = folder / "r.yaml"
    path.write_text(
        f"name: r\nmodel: {model}\nsteps: [{{quantize: {{scheme: W4A16G32}}}}]\nexport: [{{container: compress}}]\n"
        f"calibration: {{dataset: {dataset}, samples: 4, length: 32}}\nscore: {score}\n"
    )
    return read_texts(make_plan(load_recipe(path)))


def test_enough_text_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 20)
    lines = _read(demo_model(), tmp_path, str(tmp_path / "t.txt"), "{suite: quick}")
    assert not [line for line in lines if not line.startswith("tokenizer:")]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.txt", "", "holds no text"),
        ("t.txt", "word", "tokens, but 4 samples of 32 need 128"),
        ("t.txt", "\0" * 60_000, "NUL"),
        ("t.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', "tokens, but 4 samples of 32 need 128"),
        ("t.jsonl", '{"title": "hi", "body": "ho"}\n', "line 1: no text among its keys .title, body."),
        ("t.jsonl", '{"text": ' + "[" * 50_000 + "\n", "not JSON"),
        ("t.docx", "text", "expected a .yaml definition or a text file"),
    ],
)
def test_texts_that_will_not_do(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=says):
        _read(demo_model(), tmp_path, str(tmp_path / name))


def test_a_config_alone_says_that_nothing_was_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(demo_model() / "config.json", model)
    (line,) = _read(model, tmp_path, "mixed")
    assert "no tokenizer" in line


def test_weights_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        _read(model, tmp_path, "mixed")


def test_hub_sets_are_left_for_the_run(tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text("{name: hub, hub: {path: nobody/nothing, column: text}}\n")
    lines = _read(demo_model(), tmp_path, str(tmp_path / "hub.yaml"))
    assert any("is on the hub" in line for line in lines)


def _plan(model: Path, folder: Path, calibration: str, steps: str = "[{quantize: {scheme: W4A16G32}}]") -> Plan:
    path = folder / "p.yaml"
    path.write_text(
        f"name: p\nmodel: {model}\nsteps: {steps}\nexport: [{{container: compress}}]\n"
        f"calibration: {calibration}\nscore: false\n"
    )
    return make_plan(load_recipe(path))


def test_a_recipe_that_names_no_text_reads_what_goes_with_the_tokenizer(tmp_path: Path) -> None:
    """Talks where it has a chat template, and a line that says so where text is read at all."""
    chat = shutil.copytree(demo_model(), tmp_path / "chat", ignore=shutil.ignore_patterns("*.safetensors"))
    base = shutil.copytree(chat, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    plan = _plan(chat, tmp_path, "{}")
    (line,) = [line for line in plan.warnings if "mixed-chat" in line]
    assert plan.chosen == (line,) and plan.recipe.calibration.source.label == "mixed-chat"
    assert make_plan(plan.recipe).saying(plan.chosen).warnings == plan.warnings  # as a survey plans it again
    for model, calibration, label in (
        (base, "{}", "mixed"),
        (chat, "{dataset: mixed}", "mixed"),
        (chat, "{mix: {chat: 1, novels: 1}}", "chat + novels (1:1)"),
    ):
        plan = _plan(model, tmp_path, calibration)
        assert plan.recipe.calibration.source.label == label and not plan.chosen
        assert not [line for line in plan.warnings if "calibration" in line]
    assert not _plan(chat, tmp_path, "{}", steps="[]").chosen  # nothing is read


def test_what_deserves_a_line_of_a_text(tmp_path: Path) -> None:
    (folder := tmp_path / "notes").mkdir()
    (folder / "a.txt").write_text(TEXT * 20)
    (folder / "b.pdf").write_text("")
    assert any("left out: b.pdf" in line for line in _read(demo_model(), tmp_path, str(folder)))


def test_the_command_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("word")
    code, out, err = command(
        monkeypatch, capfd, "plan", "gptq-w4-g128", "--set", f"calibration.dataset={tmp_path / 't.txt'}"
    )
    assert code == 1 and not out and "tokens, but 256 samples" in err
