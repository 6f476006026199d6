"""notebooks/: each in small, on a block of the demo model under the names that they say; and what is stored of the full ones."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.pages import ROOT
from tests.integration.runs import carry_out, demo_blocks, small

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBERS = {"samples": 4, "length": 64, "windows": 6}
FEWER = {"03-what-calibration-data-changes": {"few": 2}}
GGUF = "02-compare-variants"  # its model is a file of quantized weights


def cells(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    demo_blocks(folder / "tiny-qwen3-moe", 1, experts=4)
    return folder


def test_there_are_five() -> None:
    assert [file.name[:2] for file in FILES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_in_small(file: Path, models: Path, tmp_path: Path) -> None:
    """All cells run, those whose stored outputs are tables and pictures show such ones, and files are where it says."""
    (tmp_path / "tiny-qwen3-moe").symlink_to(models / "tiny-qwen3-moe")
    if file.stem == GGUF:
        recipe = small("Q8_0", models / "tiny-qwen3-moe", models / "q8", "steps[0].quantize.solver=rtn")
        (made,) = carry_out(recipe).artifacts
        shutil.copy(models / "q8" / made.path, tmp_path / "smollm2-135m")
    numbers = [f"{name}={value}" for name, value in {**NUMBERS, **FEWER.get(file.stem, {})}.items()]
    command = [sys.executable, "-m", "tests.integration.notebook_cells", str(file), *numbers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.split(r"^--- (\S+)$", done.stdout, flags=re.MULTILINE)[1:]
    shown = dict(zip(said[::2], said[1::2], strict=True))
    for cell in cells(file):
        kinds = {
            kind for out in cell.get("outputs", ()) if out["output_type"] == "execute_result" for kind in out["data"]
        }
        for kind in kinds - {"text/plain"}:
            assert kind in shown[cell["id"]].partition("]")[0], f"{cell['id']} shows no {kind}"
    assert list((tmp_path / "out").rglob("scorecard.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_stored_is_executed_and_clean(file: Path) -> None:
    """Outputs of one execution from the top, plots among them; no errors, no warnings, no path of a machine."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and set(whole["metadata"]) == {
        "kernelspec",
        "language_info",
    }
    code = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    assert all(set(cell["metadata"]) <= {"tags"} for cell in whole["cells"])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds
    texts = json.dumps([{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in outputs])
    assert not re.search(r"(?<![\w.<:/\\-])/(home|root|tmp|usr|opt|var|mnt|work|private|Users)/", texts)
    assert "READING" not in file.read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for file in FILES:
        texts = ("".join(cell["source"]) for cell in cells(file) if cell["cell_type"] == "markdown")
        links = [link for text in texts for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert [link for link in links if not (file.parent / link).exists()] == []


# ---------------------------------------------------------------- the script that executes them


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(*outputs: dict[str, Any]) -> dict[str, Any]:
    cell = {
        "cell_type": "code", "id": "a", "execution_count": 1, "source": "x\ny", "outputs": list(outputs),
        "metadata": {"tags": ["parameters"], "execution": {"iopub.status.busy": "2020"}},
    }  # fmt: skip
    return {"cells": [cell], "metadata": {"language_info": {"version": "3.11.2"}}, "nbformat": 4, "nbformat_minor": 4}


def said(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def test_what_differs_between_executions_is_taken_out(script: ModuleType) -> None:
    picture = {
        "output_type": "display_data",
        "data": {"image/png": "a/tmp/x"},
        "metadata": {},
        "transient": {"display_id": "1"},
    }
    found = script.cleaned(notebook(said("made /tmp/nb-1/out/a.gguf in /tmp/nb-1"), picture), Path("/tmp/nb-1"))
    (cell,) = found["cells"]
    assert cell["metadata"] == {"tags": ["parameters"]} and cell["source"] == ["x\n", "y"] and cell["id"] == "a"
    assert cell["outputs"][0]["text"] == ["made out/a.gguf in ."]
    assert cell["outputs"][1] == {"output_type": "display_data", "data": {"image/png": "a/tmp/x"}, "metadata": {}}
    assert found["metadata"]["language_info"] == {"name": "python"} and found["nbformat_minor"] == 5


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (said("/home/me/x"), "names a path of this machine: /home/me/x"),
        (said("Warning: old", "stderr"), "Warning: old"),
        ({"output_type": "error", "ename": "KeyError", "evalue": "'a'", "traceback": []}, "KeyError: 'a'"),
        ({"output_type": "execute_result", "data": {"text/html": "<b>/usr/lib/x</b>"}}, "/usr/lib/x"),
    ],
)
def test_what_must_not_be_stored_stops_it(script: ModuleType, output: dict[str, Any], why: str) -> None:
    with pytest.raises(script.Unclean, match=re.escape(why)):
        script.cleaned(notebook(output), Path("/tmp/nb-1"))


def test_a_file_stays_as_it_was_where_its_notebook_fails(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    good.write_text(json.dumps(notebook()))
    bad.write_text(before := json.dumps(notebook(said("no", "stderr"))))
    monkeypatch.setattr(script, "execute", lambda whole: (whole, Path("/tmp/nb-1")))
    assert script.main([str(good), str(bad)]) == 1
    assert bad.read_text() == before and "error" in capsys.readouterr().err
    assert json.loads(good.read_text())["nbformat_minor"] == 5 and sorted(tmp_path.iterdir()) == [bad, good]
