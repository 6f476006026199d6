"""What people name on the command line of `compare`, and the runs behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.report.runs import find_runs
from compress.report.scorecard import write
from tests.cards import card


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two finished runs, one that is not, and a folder of something else."""
    for name in ("a", "b"):
        (tmp_path / "out" / name).mkdir(parents=True)
        write(card(name, 5, 0.1), tmp_path / "out" / name)
    (tmp_path / "out" / "begun" / ".work").mkdir(parents=True)
    (tmp_path / "out" / "notes").mkdir()
    return tmp_path / "out"


def test_folders_files_and_folders_of_runs(out: Path) -> None:
    for arguments in ([out / "a", out / "b"], [out / "a" / "scorecard.json", out / "b"], [out], [out, out / "a"]):
        runs, _ = find_runs([str(argument) for argument in arguments])
        assert [(run.card.recipe, run.folder, run.label) for run in runs] == [("a", "a", ""), ("b", "b", "")]


def test_folders_of_scorecards(tmp_path: Path) -> None:
    """As `compress score --output` writes them."""
    for name in ("x", "y"):
        write(card(name, 5, 0.1), tmp_path / f"{name}.json")
    (tmp_path / "other.json").write_text('{"model": 1}')
    (tmp_path / "broken.json").write_text("{")
    assert [(run.card.recipe, run.folder) for run in find_runs([str(tmp_path)])[0]] == [("x", "x"), ("y", "y")]


def test_unfinished_runs_are_skipped_with_a_line(out: Path) -> None:
    runs, skipped = find_runs([str(out)])
    assert len(runs) == 2 and skipped == [f"{out / 'begun'} holds an unfinished run"]
    runs, skipped = find_runs([str(out / "a"), str(out / "notes")])
    assert len(runs) == 1 and skipped == [f"{out / 'notes'} holds no scorecard.json"]


def test_labels(out: Path) -> None:
    runs, _ = find_runs([f"Four bits={out / 'a'}"])
    assert runs[0].label == "Four bits"
    (out / "x=y").mkdir()
    write(card("c", 5, 0.1), out / "x=y")
    assert find_runs([str(out / "x=y")])[0][0].label == ""
    with pytest.raises(CompressError, match="holds 4 runs and a label names one"):
        find_runs([f"all={out}"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing", "no run at missing"),
        ("=a", "expected LABEL=RUN"),
        ("label=", "expected LABEL=RUN"),
        ("x=missing", "no run at missing"),
    ],
)
def test_what_is_not_there(argument: str, message: str) -> None:
    with pytest.raises(CompressError, match=message) as caught:
        find_runs([argument])
    assert "\n" not in str(caught.value)


def test_nothing_left(out: Path) -> None:
    with pytest.raises(CompressError, match="holds an unfinished run; give a finished"):
        find_runs([str(out / "begun")])
    with pytest.raises(CompressError, match="none of 2 folders holds a finished run"):
        find_runs([str(out / "begun"), str(out / "notes")])


def test_a_damaged_scorecard_is_an_error(out: Path) -> None:
    (out / "a" / "scorecard.json").write_text("{")
    with pytest.raises(CompressError, match="not valid JSON"):
        find_runs([str(out)])
