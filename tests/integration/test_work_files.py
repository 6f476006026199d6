"""A run holds its folder alone, goes on only from what it wrote, and knows when there is nothing left to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, OutputError, ResumeError
from compress.models.checkpoint import Checkpoint
from compress.recipe import Recipe
from compress.report.progress import TIMES
from compress.report.scorecard import read
from compress.run import WORK, run
from compress.streaming.journal import Journal
from tests.integration.runs import TOLD, carry_out, command, names, sha256, small, text_file
from tests.tiny import tiny_model

NAME = "gptq-w4-g128"
WEIGHTS = f"{NAME}-gptq/model.safetensors"
PLAIN = ("steps[0].quantize.scheme=W4A16G32", "steps[0].quantize.solver.sweeps=0")
# structure and sensitivities are surveyed, codes and scales wait apart for the last stage
EVERYTHING = (
    "steps=[{prune_experts: {}}, {quantize: {solver: rtn, scheme: W8A16G32}}, "
    "{recover: {loss: sensitivity, epochs: 1, end_to_end: 1}}]",
    "calibration.samples=6",
    "calibration.length=32",
)


class Killed(BaseException):
    """The process is gone: nothing catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_model("qwen3_moe", folder / "model", num_experts=4)
    return folder


def plain(place: Path, output: str, *sets: str) -> Recipe:
    return small(NAME, place / "model", place / output, *PLAIN, *sets)


@pytest.fixture(scope="module")
def finished(place: Path) -> Recipe:
    """A finished run whose work folder is kept; tests copy it."""
    recipe = plain(place, "finished")
    run(recipe, keep_work=True)
    return recipe


def copied(place: Path, recipe: Recipe, name: str) -> Recipe:
    """A recipe whose output is a copy of another's."""
    shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(recipe.output, place / name)
    return recipe.model_copy(update={"output": str(place / name)})


def behind(unit: str, act: Callable[[Journal], Any], monkeypatch: pytest.MonkeyPatch, *, before: bool = False) -> None:
    """Do something once the journal has named a unit, or just before it does."""
    name = Journal.name

    def acting(self: Journal, reports: dict) -> None:
        if before and unit in reports:
            act(self)
        name(self, reports)
        if not before and unit in reports:
            act(self)

    monkeypatch.setattr(Journal, "name", acting)


def killed(*_: object) -> None:
    raise Killed


def kill(recipe: Recipe, unit: str, monkeypatch: pytest.MonkeyPatch, *, before: bool = False) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        behind(unit, killed, patch, before=before)
        run(recipe)


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: pytest.fail(f"reads {name}"))


# -- one run a folder --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["embeddings", "head"])
def test_nobody_else_writes_into_the_folder_of_a_run(
    place: Path, finished: Recipe, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the same recipe nor another, nor with --fresh, however the folder is named; the bytes are those of a run that
    was left alone."""
    mine, refused = plain(place, f"shared-{unit}"), []
    (place / f"link-{unit}").symlink_to(place / f"shared-{unit}")

    def others(_: Journal) -> None:
        for other in (mine, plain(place, f"link-{unit}", "seed=1")):
            for fresh in (False, True):
                with pytest.raises(OutputError) as caught:
                    run(other, fresh=fresh)
                refused.append(str(caught.value))

    with monkeypatch.context() as patch:
        behind(unit, others, patch)
        carry_out(mine)
    assert len(refused) == 4 and all(f"is in use by process {os.getpid()};" in line for line in refused)
    assert sha256(Path(mine.output) / WEIGHTS) == sha256(Path(finished.output) / WEIGHTS)
    assert names(Path(mine.output)) == {Path(WEIGHTS).parts[0], *TOLD}


def test_a_recipe_is_on_disk_before_its_first_unit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(plain(place, "begun"), "embeddings", monkeypatch, before=True)
    with pytest.raises(ResumeError, match=r"unfinished run of another recipe: seed is 0 there, 1 here; .*--fresh"):
        carry_out(plain(place, "begun", "seed=1"))
    carry_out(plain(place, "begun"))
    with pytest.raises(OutputError, match=r"finished run of another recipe \(.*: seed is 0 there, 1 here\); .*--fresh"):
        carry_out(plain(place, "begun", "seed=1"))
    carry_out(plain(place, "begun"))  # which is done already


def test_a_run_that_could_not_begin_leaves_nothing(place: Path) -> None:
    """A mistake that is mended is not another recipe."""
    for wrong in ("calibration.samples=100000", "score={suite: nowhere}"):
        with pytest.raises(CompressError):
            carry_out(plain(place, "mistaken", wrong))
        assert not (place / "mistaken").exists()
    carry_out(plain(place, "mistaken"))


def test_a_killed_fresh_run_over_another_recipe_goes_on(
    place: Path, finished: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other recipe made goes when there is something in its place."""
    other = small("gguf-q4-k-m", place / "model", place / "over", "steps[0].quantize.solver.sweeps=0")
    copied(place, finished, "over")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        behind("embeddings", killed, patch)
        run(other, fresh=True)
    assert (place / "over" / WEIGHTS).exists() and read(place / "over").recipe == NAME
    (made,) = carry_out(other).artifacts
    assert made.container == "gguf" and names(place / "over") == {made.path, *TOLD}
    assert read(place / "over").recipe == "gguf-q4-k-m"


# -- what a run goes on from -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["block-00000", "head"])
def stopped(request: pytest.FixtureRequest, place: Path) -> Iterator[Recipe]:
    """A run with a file of every kind, killed with much of it done."""
    recipe = small("wanda-50", place / "model", place / f"stopped-{request.param}", *EVERYTHING)
    with pytest.MonkeyPatch.context() as patch:
        kill(recipe, request.param, patch)
    yield recipe


def flip(path: Path) -> None:
    """A bit; of the journal one of a word, since a last digit may leave a number as it was."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * 0.6)
    if path.suffix == ".json":
        at = next(at for at in range(at, len(data)) if chr(data[at]).isalpha())
    data[at] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_every_file_that_is_gone_on_from_is_proved(place: Path, stopped: Recipe, no_weight_is_read: None) -> None:
    work = Path(stopped.output) / WORK
    # what tells what the run was, and how long it took, is not gone on from
    files = sorted(names(work) - {"recipe.json", TIMES})
    kinds = {name.split("-")[0].split(".")[0] for name in files}
    assert kinds >= {"journal", "embeddings", "block", "structure", "sensitivity", "original", "outcomes"}
    assert kinds & {"activations", "head"}
    for name in files:
        for damage in (flip, zero, Path.unlink):
            if damage is Path.unlink and name == "journal.json":
                continue  # the run begins anew
            recipe = copied(place, stopped, "damaged")
            damage(place / "damaged" / WORK / name)
            with pytest.raises(ResumeError, match=rf"{name} .*--fresh"):
                carry_out(recipe)


def test_every_byte_of_the_journal_is_proved(place: Path, stopped: Recipe) -> None:
    """It holds answers of surveys, not only names. A changed digit far behind the point may leave a number as it was."""
    copied(place, stopped, "damaged")
    path = place / "damaged" / WORK / "journal.json"
    data = path.read_bytes()
    said, refused = json.loads(data), 0
    for at in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        try:
            assert Journal.open(path.parent, said["digest"]).units == said["units"]
        except ResumeError as error:
            refused += 1
            assert "journal.json is damaged" in str(error)
    assert refused > 250


def test_undamaged_it_comes_to_the_bytes_of_a_run_that_nothing_stopped(place: Path, stopped: Recipe) -> None:
    whole = stopped.model_copy(update={"output": str(place / "everything")})
    carry_out(whole)  # the second time there is nothing to do
    recipe = copied(place, stopped, "resumed")
    carry_out(recipe)
    assert read(recipe.output).files == read(whole.output).files
    assert WORK not in names(Path(recipe.output))


def test_other_calibration_text_is_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(NAME, place / "model", place / "reads" / "out", *PLAIN)
    kill(recipe, "block-00000", monkeypatch)
    text_file(place / "reads" / "calibration.txt", seed=5)
    with pytest.raises(ResumeError, match=r"calibration text .*--fresh"):
        carry_out(recipe)
    text_file(place / "reads" / "calibration.txt")
    carry_out(recipe)


# -- nothing left to do ------------------------------------------------------------------------------------------------
def mortal(function: Callable[..., None], calls: int) -> Callable[..., None]:
    """A function that does its work so many times, and never again."""
    left = iter(range(calls))

    def dying(*arguments: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise Killed
        function(*arguments, **options)

    return dying


def test_killed_at_every_file_that_is_removed(
    place: Path, finished: Recipe, no_weight_is_read: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work folder of a finished run, cut short anywhere: the run is still finished."""
    delivered = {name: sha256(place / "finished" / name) for name in ("scorecard.json", WEIGHTS)}
    count = len(names(place / "finished" / WORK)) + 1  # and the lock
    for last in range(count + 1):
        recipe = copied(place, finished, "removed")
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", mortal(os.unlink, last))
            try:
                carry_out(recipe)
                assert last >= count
            except Killed:
                assert last < count
        carry_out(recipe)
        assert WORK not in names(place / "removed")
        assert {name: sha256(place / "removed" / name) for name in delivered} == delivered


def test_a_finished_run_is_not_done_again(
    place: Path, finished: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    recipe = copied(place, finished, "again")
    arguments = ["run", NAME, "--model", recipe.model, "--output", recipe.output]
    for value in (*PLAIN, "calibration.samples=4", "calibration.length=64", "score=false",
                  f"calibration.dataset={place / 'calibration.txt'}"):  # fmt: skip
        arguments += ["--set", value]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda self, name: pytest.fail(f"reads {name}"))
        before = {p: p.stat().st_mtime_ns for p in (place / "again").rglob("*") if WORK not in p.parts and p.is_file()}
        code, out, err = command(monkeypatch, capfd, *arguments)
        assert code == 0 and "already done" in err and "--fresh" in err and str(place / "again") in out
        assert {p: p.stat().st_mtime_ns for p in before} == before
        flip(place / "again" / WEIGHTS)
        code, _, err = command(monkeypatch, capfd, *arguments, "-q")
        assert code == 1 and err.count("\n") == 1
        assert f"{WEIGHTS} has changed" in err and "--fresh" in err
        (place / "again" / WEIGHTS).unlink()
        code, _, err = command(monkeypatch, capfd, *arguments, "-q")
        assert code == 1 and f"{WEIGHTS} is missing" in err
    code, _, err = command(monkeypatch, capfd, *arguments, "-q", "--fresh")
    assert code == 0 and sha256(place / "again" / WEIGHTS) == sha256(place / "finished" / WEIGHTS)


def test_what_would_come_out_otherwise_is_done_again(place: Path, finished: Recipe) -> None:
    """Another limit, suite or text is other work; the scorecard of an earlier version proves nothing."""
    recipe = copied(place, finished, "otherwise")
    created = read(recipe.output).run_digest
    suite = place / "suite.yaml"
    suite.write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    card = carry_out(plain(place, "otherwise", f"score={{suite: {suite}}}"))
    assert card.artifacts[0].scores is not None and card.run_digest != created
    older = card.model_copy(update={"run_digest": None, "created": None})
    (place / "otherwise" / "scorecard.json").write_text(older.to_json())
    assert carry_out(plain(place, "otherwise", f"score={{suite: {suite}}}")).created is not None


# -- what was delivered ------------------------------------------------------------------------------------------------
def test_every_artifact_has_its_checksum(
    place: Path, finished: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """And `verify` recomputes it, `score` compares it."""
    recipe = copied(place, finished, "proved")
    out, artifact = place / "proved", read(recipe.output).artifacts[0]
    assert artifact.sha256 and artifact.files == {
        f.relative_to(out).as_posix(): sha256(f)
        for f in (out / artifact.path).rglob("*")
        if f.is_file() and f.name != "README.md"  # its card tells what was measured of it
    }
    code, said, _ = command(monkeypatch, capfd, "verify", str(out))
    assert code == 0 and {line.split()[0] for line in said.splitlines()} == {"ok"}
    flip(out / WEIGHTS)
    for target in (out, out / artifact.path):
        code, said, err = command(monkeypatch, capfd, "verify", str(target))
        assert code == 1 and "--fresh" in err
        assert [line.split() for line in said.splitlines() if not line.startswith("ok ")] == [["changed", WEIGHTS]]
    code, said, err = command(monkeypatch, capfd, "score", str(out / artifact.path), "--against", recipe.model, "-q")
    assert code == 1 and not said and f"{WEIGHTS} has changed" in err


def test_a_rejected_artifact_has_its_checksum_where_it_lies(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    suite = place / "suite.yaml"
    suite.write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    recipe = plain(place, "rejected-run", f"score={{suite: {suite}}}", "gate.max_kld=1e-9")
    with pytest.raises(CompressError, match="gate failed"):
        carry_out(recipe)
    code, said, _ = command(monkeypatch, capfd, "verify", recipe.output)
    assert code == 0 and f"ok         rejected/{WEIGHTS}\n" in said
