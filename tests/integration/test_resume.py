"""A run killed at any moment leaves nothing half-written under a final name and resumes to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import ResumeError
from compress.models.checkpoint import Checkpoint
from compress.report.progress import TIMES
from compress.report.scorecard import read
from compress.run import WORK, run
from tests.integration.runs import SMALL, TOLD, carry_out, command, final_names, names, sha256, small, text_file
from tests.tiny import tiny_model

RECIPE = "gguf-q4-k-m"
FILE = "model-Q4_K_M.gguf"
MOMENTS = (
    "calibrating_first_block",
    "writing_activations",
    "between_unit_and_journal",
    "between_blocks",
    "writing_container",
    "checking_container",
    "before_scorecard",
)
LONG = 1e6  # seconds, as no stage of these tests takes
DELIVERED = {FILE, *TOLD}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_model("qwen3_moe", folder / "model", num_experts=3)
    text_file(folder / "calibration.txt")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> str:
    """sha256 of the file of a run that nothing disturbed."""
    carry_out(small(RECIPE, place / "model", place / "whole"))
    return sha256(place / "whole" / FILE)


def kill(place: Path) -> dict[str, Path]:
    """Output folders of runs that were killed, by moment."""
    outputs = {moment: place / moment for moment in MOMENTS}
    spec = {"recipe": RECIPE, "model": str(place / "model"), "moments": {m: str(o) for m, o in outputs.items()},
            "sets": [*SMALL, f"calibration.dataset={place / 'calibration.txt'}"]}  # fmt: skip
    (place / "spec.json").write_text(json.dumps(spec))
    driver = Path(__file__).with_name("kill_driver.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    arguments = [sys.executable, str(driver), str(place / "spec.json")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    statuses = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in MOMENTS)
    assert statuses == {m: str(int(signal.SIGKILL)) for m in MOMENTS}, done.stderr
    return outputs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_killed_runs_resume_to_the_same_bytes(whole: str, place: Path) -> None:
    """One test for all moments: the driver imports everything once."""
    pytest.importorskip("llama_cpp")
    undisturbed = read(place / "whole")
    same = {"experts", "fallbacks", "gate", "artifacts", "base"}
    for moment, output in kill(place).items():
        left = final_names(output)
        if moment == "before_scorecard":
            assert left == {FILE} and sha256(output / FILE) == whole
        else:
            assert left <= {".checking"}, moment  # written there, proved there, and only then renamed
        kept = as_if_longer(output)
        card = carry_out(small(RECIPE, place / "model", output))
        assert sha256(output / FILE) == whole, moment
        assert names(output) == DELIVERED, moment
        assert card.model_dump(include=same) == undisturbed.model_dump(include=same), moment
        took = {stage.name: stage.seconds for stage in card.stages}
        assert set(took) == {stage.name for stage in undisturbed.stages}, "every stage once"
        assert kept and all(LONG <= seconds <= took[name] < 2 * LONG for name, seconds in kept.items()), moment


def as_if_longer(output: Path) -> dict[str, float]:
    """Seconds of stages that a killed process has kept, each with LONG added to it: the test needs no patience."""
    path = output / WORK / TIMES
    saved = json.loads(path.read_text())
    saved["stages"] = [{**stage, "seconds": stage["seconds"] + LONG} for stage in saved["stages"]]
    path.write_text(json.dumps(saved))
    return {stage["name"]: stage["seconds"] for stage in saved["stages"]}


def test_finished_blocks_are_not_computed_again(place: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption in the second block, weights of the first are not even read."""
    from compress.streaming.journal import Journal

    recipe = small(RECIPE, place / "model", place / "counted")
    finish = Journal.finish

    def interrupted(self: Journal, unit: str, *rest: object) -> None:
        if unit == "block-00001":
            raise KeyboardInterrupt
        finish(self, unit, *rest)

    monkeypatch.setattr(Journal, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out(recipe)
    monkeypatch.undo()
    read_names: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: (read_names.append(name), load(self, name))[1])
    carry_out(recipe)
    assert any(".layers.1." in name for name in read_names)
    assert not any(".layers.0." in name or "embed" in name for name in read_names)
    assert sha256(place / "counted" / FILE) == whole


def interrupt_after_first_block(recipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.streaming.journal import Journal

    finish = Journal.finish

    def interrupted(self: Journal, unit: str, *rest: object) -> None:
        finish(self, unit, *rest)
        if unit == "block-00000":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", interrupted)
        carry_out(recipe)


def test_changed_recipe_needs_fresh(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    output = place / "changed"
    interrupt_after_first_block(small(RECIPE, place / "model", output), monkeypatch)
    before = {p.name: p.stat().st_mtime_ns for p in (output / WORK).iterdir()}
    changed = small(RECIPE, place / "model", output, "steps[0].quantize.solver.sweeps=0")
    with pytest.raises(ResumeError, match="--fresh"):
        carry_out(changed)
    assert {p.name: p.stat().st_mtime_ns for p in (output / WORK).iterdir()} == before  # untouched
    card = run(changed, fresh=True)
    assert card.gate.passed and names(output) == DELIVERED
    undisturbed = small(RECIPE, place / "model", place / "changed-whole", "steps[0].quantize.solver.sweeps=0")
    carry_out(undisturbed)
    assert sha256(output / FILE) == sha256(place / "changed-whole" / FILE)


def test_command_line_names_fresh(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    output = place / "cli"
    interrupt_after_first_block(small(RECIPE, place / "model", output), monkeypatch)
    arguments = ["run", RECIPE, "--model", str(place / "model"), "--output", str(output), "--quiet",
                 "--set", f"calibration.dataset={place / 'calibration.txt'}", "--set", "score=false",
                 "--set", "calibration.samples=3", "--set", "calibration.length=64"]  # fmt: skip
    code, _, stderr = command(monkeypatch, capfd, *arguments)
    assert code == 1
    assert stderr.count("\n") == 1 and "--fresh" in stderr and "another recipe" in stderr
    code, stdout, _ = command(monkeypatch, capfd, *arguments, "--fresh")
    assert code == 0 and str(output / FILE) in stdout


def test_limits_and_suite_may_change_on_resume(place: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide no byte of the output."""
    output = place / "rescored"
    interrupt_after_first_block(small(RECIPE, place / "model", output), monkeypatch)
    suite = place / "suite.yaml"
    suite.write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    card = carry_out(small(RECIPE, place / "model", output, f"score={{suite: {suite}}}", "gate.max_kld=100.0"))
    assert card.artifacts[0].scores is not None
    assert sha256(output / FILE) == whole


def test_damaged_journal_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place / "damaged"
    recipe = small(RECIPE, place / "model", output)
    interrupt_after_first_block(recipe, monkeypatch)
    unit = output / WORK / "block-00000.safetensors"
    unit.write_bytes(unit.read_bytes()[:-100])
    with pytest.raises(ResumeError, match=r"block-00000.*--fresh"):
        carry_out(recipe)
    (output / WORK / "journal.json").write_text("{")
    with pytest.raises(ResumeError, match="--fresh"):
        carry_out(recipe)


def test_truncated_activations_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place / "short"
    recipe = small(RECIPE, place / "model", output)
    interrupt_after_first_block(recipe, monkeypatch)
    file = output / WORK / "activations-00001.f32"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ResumeError, match=r"activations-00001.*--fresh"):
        carry_out(recipe)


def test_same_command_again_after_success(place: Path, whole: str) -> None:
    """A finished run done again gives the same bytes and leaves nothing else behind."""
    output = place / "whole"
    carry_out(small(RECIPE, place / "model", output))
    assert sha256(output / FILE) == whole
    assert names(output) == DELIVERED
