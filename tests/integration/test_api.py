"""`compress.run`, `plan`, `score` and `compare` as docs/python.md has them, on a block of the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import compress
from compress.errors import CompressError, NoSuchRun, RecipeError
from compress.recipe import load_recipe
from compress.report.scorecard import read
from compress.run.loop import run as carry_out
from tests.integration.pages import ROOT
from tests.integration.runs import demo_blocks, sha256

SUITE = "{name: few, text: wikipedia, windows: 6, length: 64}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    demo_blocks(folder / "model", 1, experts=4)
    (folder / "few.yaml").write_text(SUITE)
    return folder


def recipe(place: Path) -> dict:
    """Values as Python has them: a tuple, paths."""
    return {
        "model": place / "model",
        "calibration": {"samples": 4, "length": 64},
        "steps": ({"quantize": {"solver": "rtn", "scheme": "Q8_0"}},),
        "export": [{"container": "gguf"}],
        "score": {"suite": place / "few.yaml"},
    }


@pytest.fixture(scope="module")
def q8(place: Path) -> compress.Result:
    return compress.run(recipe(place), output=place / "out" / "q8", quiet=True)


@pytest.fixture(scope="module")
def q4(place: Path) -> compress.Result:
    """By the name of a type, with values of the recipe changed."""
    changes = {"samples": 4, "length": 64, "solver": "rtn", "score": {"suite": place / "few.yaml"}}
    return compress.run("Q4_0", model=place / "model", output=place / "out" / "q4", set=changes, quiet=True)


def test_all_spellings_of_a_recipe_are_one(place: Path, q8: compress.Result) -> None:
    """The same bytes as the inner function makes of the file; a value of it plans the same."""
    plain = {**recipe(place), "model": str(place / "model"), "steps": list(recipe(place)["steps"]), "score": False}
    (place / "r.yaml").write_text(json.dumps(plain))
    loaded = load_recipe(place / "r.yaml", output=str(place / "inner"))
    (made,) = carry_out(loaded).artifacts
    named = compress.run(recipe(place), output=place / "named", set={"name": "r", "score": False}, quiet=True)
    assert sha256(place / "inner" / made.path) == sha256(named.path)
    digests = {compress.plan(given, **more).recipe.digest() for given, more in (
        (loaded, {}),
        (recipe(place), {"set": {"name": "r"}}),
        (str(place / "r.yaml"), {}),
        (compress.load_recipe("Q8_0", ["solver=rtn"], model=str(place / "model")), {"set": ["samples=4", "length=64", "name=r"]}),
    )}  # fmt: skip
    assert len(digests) == 1


def test_a_result_is_what_lies_in_the_folder(place: Path, q8: compress.Result) -> None:
    assert q8.scorecard == read(place / "out" / "q8") and q8.path.is_file() and q8.folder == place / "out" / "q8"
    assert (
        compress.run(recipe(place), output=place / "out" / "q8", quiet=True).scorecard == q8.scorecard
    )  # already done
    pytest.importorskip("pandas")
    tensors = q8.to_pandas("tensors")
    assert len(tensors) == len((q8.folder / "tensors.jsonl").read_text().splitlines())


def test_one_target_or_several(place: Path, q8: compress.Result, q4: compress.Result) -> None:
    """A result, a path and a folder of a run are the same model, and score as the run itself did."""
    original, suite = place / "model", place / "few.yaml"
    found = compress.score([q8, str(q8.path), q4.folder], original, suite=suite, quiet=True)
    assert [result.path for result in found] == [q8.path, q8.path, q4.path]
    assert found[0].scores.kld == found[1].scores.kld == q8.scores.kld and found[2].scores.kld == q4.scores.kld
    alone = compress.score(q4, suite=suite, quiet=True)
    assert isinstance(alone, compress.Result) and alone.scores.kld is None
    assert alone.scores.perplexity == q4.scores.perplexity


def test_what_is_compared(place: Path, q8: compress.Result, q4: compress.Result) -> None:
    for runs in (
        (q8, q4),
        ([q8, q4],),
        (q8.folder, str(q4.folder)),
        (place / "out",),
        (q8.scorecard, q4.folder / "scorecard.json"),
    ):
        assert [row.bytes for row in compress.compare(*runs).rows[1:]] == [
            q8.path.stat().st_size,
            q4.path.stat().st_size,
        ]
    labelled = compress.compare({"eight": q8, "four": str(q4.folder), "card": q4.scorecard})
    assert {row.name for row in labelled.rows} == {"original", "eight", "four", "card"}
    assert compress.compare(q8, q4, memory="3MB").advice[0].startswith("Within 3MB")


def test_a_plan_shows_itself(place: Path) -> None:
    plan = compress.plan("Q8_0", model=place / "model", set="samples=4")
    assert isinstance(plan, compress.Plan) and plan.recipe.calibration.samples == 4
    bundle = plan._repr_mimebundle_()
    assert "routed_experts.down" in bundle["text/html"] and "routed_experts.down" in bundle["text/plain"]
    assert repr(plan).startswith("<Plan model-Q8_0 of ") and len(repr(plan)) < 300


def test_lines_where_there_is_no_terminal_and_none_when_quiet(
    place: Path, q8: compress.Result, capfd: pytest.CaptureFixture
) -> None:
    compress.score(q8, suite=place / "few.yaml")
    out, err = capfd.readouterr()
    assert out == "" and "score" in err
    compress.score(q8, suite=place / "few.yaml", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_is_said(place: Path, q8: compress.Result, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe: steps.*unknown"):
        compress.plan({**recipe(place), "steps": [{"quantize": {"scheme": "Q8_0", "solvr": "rtn"}}]})
    with pytest.raises(RecipeError, match="sample"):
        compress.plan("Q8_0", model=place / "model", set={"samplez": 4})
    with pytest.raises(NoSuchRun):
        compress.compare(place / "nothing")
    with pytest.raises(CompressError, match="cannot compare a int"):
        compress.compare(3)
    with pytest.raises(CompressError, match="nothing to compare"):
        compress.compare()
    with pytest.raises(CompressError, match="a size like 4GB"):
        compress.compare(q8, memory="much")
    assert q8.folder is not None
    for name in ("one", "other"):
        shutil.copytree(q8.folder, tmp_path / name)
    with pytest.raises(CompressError, match="holds 2 runs and the label both names one"):
        compress.compare({"both": tmp_path})


def test_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, executed from the top."""
    import re

    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    work = place / "page"
    work.mkdir()
    (work / "tiny-qwen3-moe").symlink_to(place / "model")
    (work / "few.yaml").write_text(SUITE)
    monkeypatch.chdir(work)
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        exec(
            compile(
                block.replace('"samples": 64', '"samples": 4, "length": 64').replace('"quick"', '"few.yaml"'),
                "python.md",
                "exec",
            ),
            names,
        )
    assert names["compared"].best
