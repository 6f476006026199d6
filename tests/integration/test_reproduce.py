"""compress reproduce: a run's folder gives its bytes again, wherever model and text lie; what differs is said, if need be before
the work."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from compress.errors import CheckpointError
from compress.models.checkpoint import Checkpoint, checksums
from compress.report.checksums import verify
from compress.report.reproduction import Original
from compress.report.scorecard import read
from compress.run import WORK, loop
from compress.run.told import Expected
from tests.integration.runs import TOLD, Compress, carry_out, final_names, names, sha256, small, text_file
from tests.tiny import tiny_model

RECIPE = """
name: pair
model: nowhere
steps: [{quantize: {solver: {name: gptq, sweeps: 0, refits: 0}, scheme: W4A16G32, rules: [{targets: lm_head, codec: int8-g32}]}}]
export: [{container: compress}, {container: gptq}]
gate: {max_kld: 100.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, scored, with the model and the text that it was made from; both once more under other names."""
    place = tmp_path_factory.mktemp("reproduce")
    model = tiny_model("llama", place / "model", dtype="bfloat16")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    (model / "LICENSE").write_text("Do what you want.\n")
    (place / "pair.yaml").write_text(RECIPE)
    (place / "two.yaml").write_text("{name: two, text: wikipedia, windows: 2, length: 64}\n")
    carry_out(small(place / "pair.yaml", model, place / "out", f"score={{suite: {place / 'two.yaml'}}}"))
    shutil.copytree(model, place / "elsewhere" / "copied")
    shutil.copy(place / "calibration.txt", place / "elsewhere" / "renamed.txt")
    return place


@pytest.fixture(scope="module")
def here(place: Path) -> list[str]:
    """Where model and text lie."""
    copies = place / "elsewhere"
    return ["--model", str(copies / "copied"), "--set", f"calibration.dataset={copies / 'renamed.txt'}"]


def changed(place: Path, target: Path, **values: Any) -> Path:
    """reproduce.json with other values, in a folder of its own."""
    target.mkdir(exist_ok=True)
    said = json.loads((place / "out" / "reproduce.json").read_text())
    (target / "reproduce.json").write_text(json.dumps({**said, **values}))
    return target / "reproduce.json"


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_reproduces_it(place: Path) -> None:
    """Checksums of the original's files, those of what was made, and nowhere a path."""
    said, card = json.loads((place / "out" / "reproduce.json").read_text()), read(place / "out")
    assert final_names(place / "out") == {"pair-compress", "pair-gptq", *TOLD}
    assert said["original"]["files"] == {path.name: sha256(path) for path in (place / "model").iterdir()}
    assert said["files"] == card.files == {name: sha256(place / "out" / name) for name in card.files}
    assert said["recipe"] == json.loads((place / "out" / "recipe.json").read_text())
    assert (said["recipe"]["model"], said["recipe"]["calibration"]["dataset"]) == ("model", "calibration.txt")
    assert said["suite"] == "two" and said["versions"]["compress"] and said["machine"]["threads"] == 1
    for name in card.told:
        assert str(place) not in (place / "out" / name).read_text(), name
        assert name not in card.files, "its scores are behind the checksums"
    assert set(verify(place / "out").values()) == {"ok"}
    assert set(verify(place / "out" / "pair-gptq").values()) == {"ok"}


def test_cards_are_those_of_the_run(place: Path) -> None:
    whole, folder = ((place / "out" / name).read_text() for name in ("README.md", "pair-compress/README.md"))
    kld = read(place / "out").artifacts[0].scores.kld
    assert "license: mit" in whole and f"value: {kld.mean:.6g}" in whole
    assert "| `pair-compress` |" in whole and "| `pair-gptq` |" in whole
    assert "pair-gptq" not in folder and "import compress\n" in folder
    assert "Carried along from the original: `LICENSE`, `README-original.md`." in folder
    assert (place / "out" / "pair-compress" / "README-original.md").read_text().endswith("# A model\n")


def test_what_a_card_says_to_type_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (place / "out" / "pair-compress" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(place / "out")
    exec(code, {})
    assert capsys.readouterr().out.startswith("The city of London")


@pytest.mark.parametrize("done", [0, 3])
def test_killed_behind_its_scorecard_a_run_still_gets_its_cards(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """With some of what tells of it in place, and with none."""
    recipe = small(place / "pair.yaml", place / "model", tmp_path / "out", "gate={}")
    from compress.run import told

    replaced = 0

    def killed(source: Path, target: Path, replace: Any = told.os.replace) -> None:
        nonlocal replaced
        if f"/{told.TOLD}/" in str(source) and not target.name.endswith(".tmp") and WORK not in target.parts:
            replaced += 1
            if replaced > done:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(told.os, "replace", killed)
        carry_out(recipe)
    left = {name for name in read(tmp_path / "out").told if (tmp_path / "out" / name).exists()}
    assert len(left) == 1 + done
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compress_model", None)  # nothing is done again
        carry_out(recipe)
    assert all((tmp_path / "out" / name).is_file() for name in read(tmp_path / "out").told)
    assert names(tmp_path / "out") == {"pair-compress", "pair-gptq", *TOLD}


def test_an_artifact_of_an_earlier_run_goes_with_its_card(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    recipe = small(
        place / "pair.yaml", place / "model", tmp_path / "out", "export=[{container: gptq}]", "gate.max_kld=1e-9",
        f"score={{suite: {place / 'two.yaml'}}}",
    )  # fmt: skip
    with pytest.raises(Exception, match="gate failed"):
        carry_out(recipe, fresh=True)
    assert final_names(tmp_path / "out") == {"rejected", "scorecard.json", "recipe.json", "tensors.jsonl"}
    assert not (tmp_path / "out" / "rejected" / "pair-gptq" / "README.md").exists()


# ---------------------------------------------------------------- the same bytes


def test_the_same_bytes_from_another_place(
    place: Path, here: list[str], compress: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a model and a text under other names: files say what they said. Its own reproduce.json gives them once more."""
    monkeypatch.chdir(tmp_path)
    (place / "elsewhere" / "copied" / "README.md").write_text("# Changed, which decides nothing\n")
    code, out, err = compress("reproduce", place / "out", *here)
    (place / "elsewhere" / "copied" / "README.md").write_bytes((place / "model" / "README.md").read_bytes())
    assert "README.md of the original is another one" in err
    told = {f"pair-{c}/README-original.md": "different" for c in ("compress", "gptq")}
    found = dict(reversed(line.split()) for line in out.splitlines())
    assert found == {**dict.fromkeys(read(place / "out").files, "same"), **told} and code == 3
    again = json.loads((tmp_path / "out" / "pair-reproduced" / "reproduce.json").read_text())
    first = json.loads((place / "out" / "reproduce.json").read_text())
    assert again["recipe"] == {**first["recipe"], "score": False, "gate": {}}
    assert again["original"] == {
        **first["original"],
        "files": {**first["original"]["files"], "README.md": again["original"]["files"]["README.md"]},
    }


def test_with_all_the_same_it_ends_with_0(
    place: Path, here: list[str], compress: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = compress("reproduce", place / "out" / "reproduce.json", *here, "--output", "again", "--json")
    assert code == 0 and "differs from the first time" not in err
    said = json.loads(out)
    assert (said["folder"], said["same"], said["changes"]) == ("again", True, [])
    assert said["files"] == dict.fromkeys(read(place / "out").files, "same")
    code, out, err = compress("reproduce", place / "out", *here, "--output", "again")
    assert code == 1 and not out and "again holds a finished run" in err


def test_what_differs_is_said(place: Path, here: list[str], compress: Compress, tmp_path: Path) -> None:
    said = json.loads((place / "out" / "reproduce.json").read_text())
    files = {**said["files"], "pair-gptq/model.safetensors": "0" * 64, "gone.txt": "1" * 64}
    del files["pair-gptq/config.json"]
    versions, machine = (
        {**said["versions"], "torch": "1.0", "lm-eval": "0"},
        {**said["machine"], "cpu": "a Z80", "threads": 64},
    )
    file = changed(place, tmp_path / "run", files=files, versions=versions, machine=machine)
    code, out, err = compress("reproduce", file, *here, "--output", tmp_path / "again", "--quiet")
    assert code == 3
    assert sorted(out.splitlines()) == [
        "different  pair-gptq/model.safetensors", "missing    gone.txt", "unexpected pair-gptq/config.json",
    ]  # fmt: skip
    (line,) = err.strip().splitlines()
    for part in ("3 of ", "torch: 1.0 there", "cpu: a Z80 there", "threads: 64 there, 1 here", str(tmp_path / "again")):
        assert part in line
    assert "lm-eval" not in line


@pytest.mark.parametrize(("wanted", "cores", "used"), [(3, 4, 3), (3, 2, 1), (1, 4, 1), (None, 4, 1), (0, 4, 1)])
def test_as_many_threads_as_the_first_time(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, cores: int, used: int
) -> None:
    """Where there are the cores; what the scorecard says goes with it, and both are put back."""
    from compress import machine
    from compress.run import reproduce

    here = machine.Machine(machine.Cpu("", (), cores), machine.Memory(None, None))
    monkeypatch.setattr(machine, "look", lambda: here)
    monkeypatch.setattr(reproduce.machine, "threads", lambda: int(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with reproduce._threads(wanted):
        assert (torch.get_num_threads(), machine.threads()) == (used, used)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")


def test_it_computes_where_it_was_computed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.report.reproduction import read as read_made
    from compress.run import reproduce

    monkeypatch.delenv("COMPRESS_DEVICE", raising=False)
    made = read_made(place / "out")
    for device, found in (("cpu", "cpu"), ("cuda:0", "cuda:0"), ("cuda:7", "cpu"), ("a Z80", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        there = made.model_copy(update={"machine": {**made.machine, "device": device}})
        assert reproduce._device(there, None) == found
        assert reproduce._device(there, "cpu") == "cpu"


def test_a_gguf_by_another_name_is_the_same_original(place: Path, tmp_path: Path) -> None:
    recipe = small("gguf-q4-k-m", place / "model", tmp_path / "out", "steps=[]")
    (made,) = carry_out(recipe).artifacts
    expected = Expected(recipe, Original(name="m", files=checksums(Checkpoint.open(tmp_path / "out" / made.path))))
    shutil.copy(tmp_path / "out" / made.path, tmp_path / "other.gguf")
    assert expected.require_original(Checkpoint.open(tmp_path / "other.gguf")) == []
    with pytest.raises(CheckpointError, match=r"another original: .* \(and \d more\)"):
        expected.require_original(Checkpoint.open(place / "model"))


# ---------------------------------------------------------------- before the work


def test_another_original_is_refused_before_the_work(
    place: Path, here: list[str], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "compress_model", None)
    other, text = shutil.copytree(place / "model", tmp_path / "other"), here[2:]
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    for name, content in (
        ("model.safetensors", bytes(data)),
        ("tokenizer.json", None),
        ("chat_template.jinja", b"{{ x }}"),
    ):
        before = (other / name).read_bytes() if (other / name).exists() else None
        content = content or (before or b"") + b" "
        (other / name).write_bytes(content)
        code, out, err = compress(
            "reproduce", place / "out", "--model", other, *text, "--output", tmp_path / "again", "-q"
        )
        assert (code, out) == (1, "") and err.count("\n") == 1, err
        assert f"another original: {name} in {other}" in err and "--model" in err
        assert not (tmp_path / "again").exists()
        (other / name).unlink() if before is None else (other / name).write_bytes(before)


def test_another_text_is_refused_before_the_work(
    place: Path, here: list[str], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "compress_model", None)
    text = text_file(tmp_path / "calibration.txt", seed=1)
    code, out, err = compress(
        "reproduce",
        place / "out",
        *here[:2],
        "--set",
        f"calibration.dataset={text}",
        "--output",
        tmp_path / "again",
        "-q",
    )
    assert (code, out) == (1, "") and "another calibration text" in err and "--set calibration.dataset" in err
    assert not (tmp_path / "again").exists()


def test_what_only_a_name_is_known_of_is_asked_for(
    place: Path, here: list[str], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = compress("reproduce", place / "out", "-q")
    assert code == 2 and err.count("\n") == 1 and "known by its name, model," in err and "--model" in err
    code, _, err = compress("reproduce", place / "out", *here[:2], "-q")
    assert (
        code == 2
        and err.count("\n") == 1
        and "its name, calibration.txt," in err
        and "--set calibration.dataset" in err
    )


def test_plugins_are_asked_for_and_damaged_ladders_are_told(place: Path, compress: Compress, tmp_path: Path) -> None:
    code, _, err = compress("reproduce", changed(place, tmp_path / "a", plugins=["a" * 64]), "-q")
    assert code == 2 and "--plugin" in err
    code, _, err = compress("reproduce", changed(place, tmp_path / "b", ladder={"types": ["Q8_0"]}), "-q")
    assert code == 1 and "ladder" in err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(None, 2, "there is no"), ("{", 1, "not valid JSON"), ("[]", 1, "does not say how"), ("{}", 1, "recipe: field required"),
     ('{"format": 2}', 1, "format 2, this version reads 1"), ({"files": {"../x": "0"}}, 1, "not in the scorecard's folder"),
     ({"recipe": {"name": "x"}}, 2, "model: "), ({"original": {"files": {}}}, 1, "original.name: field required")],
)  # fmt: skip
def test_files_that_say_nothing(
    place: Path, compress: Compress, tmp_path: Path, content: Any, code: int, message: str
) -> None:
    if isinstance(content, dict):
        changed(place, tmp_path, **content)
    elif content is not None:
        (tmp_path / "reproduce.json").write_text(content)
    found, out, err = compress("reproduce", tmp_path, "-q", "--output", tmp_path / "again")
    assert (found, out) == (code, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------- from the hub


def test_a_repository_is_asked_for_its_file(
    place: Path, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repo: str, name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repo, name, revision))
        return str(place / "out" / "reproduce.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    for target in ("me/pair", "me/pair@v1"):
        assert "known by its name, model" in compress("reproduce", target, "-q")[2]
    assert asked == [("me/pair", "reproduce.json", None), ("me/pair", "reproduce.json", "v1")]


@pytest.mark.parametrize("target", ["nobody/nothing", "nothing", "folder/reproduce.json", "./a/b", "a/b/c"])
def test_what_is_nowhere_is_one_line(compress: Compress, target: str) -> None:
    """The hub is not asked, for the tests are offline."""
    code, out, err = compress("reproduce", target, "-q")
    assert (code, out) == (2, "") and err.count("\n") == 1 and target in err
    assert ("hf auth login" in err) == (target == "nobody/nothing")
