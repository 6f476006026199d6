"""docs/adding-a-container.md, executed: the one file on that page is planned, written, gated, scored and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.pages import block, compress, sets, write_block
from tests.integration.runs import command, demo_blocks, text_file

PAGE = "adding-a-container.md"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_block(PAGE, "python", tmp_path / "npy.py")
    write_block(PAGE, "yaml", tmp_path / "npy.yaml")
    (tmp_path / "suite.yaml").write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    return tmp_path


def test_the_page(
    page: Path, forget_plugins: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """On one block of the demo model, without the solver's sweeps."""
    model, text = demo_blocks(page / "model", 1, 4), text_file(page / "text.txt")
    small = sets("calibration.samples=4", "calibration.length=64", f"calibration.dataset={text}",
                 f"score.suite={page / 'suite.yaml'}", "steps[0].quantize.solver.sweeps=0")  # fmt: skip
    given = [
        page / "npy.yaml",
        "--model",
        model,
        "--plugin",
        page / "npy.py",
        *small,
    ]
    planned = compress("plan", *given, "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    code, out, err = command(monkeypatch, capfd, "run", *map(str, given), "--output", str(page / "out"))
    assert code == 0, err + out
    card = json.loads((page / "out" / "scorecard.json").read_text())
    assert card["gate"]["passed"] and all("expert" in fallback["subject"] for fallback in card["fallbacks"])
    (artifact,) = card["artifacts"]
    assert (artifact["container"], artifact["scores"]["engine"]) == ("npy", "decoded weights")
    assert 0 < artifact["scores"]["kld"]["mean"] < 1
    files = sorted((page / "out" / artifact["path"]).glob("*.npy"))
    assert {file.stem for file in files} == {tensor["name"] for tensor in plan["tensors"]}
    assert sum(file.stat().st_size for file in files) == plan["file_bytes"]["npy"]
    row = next(np.load(file)[0] for file in files if "q_proj" in file.name)
    assert len(np.unique(row)) <= 16 * (len(row) // 32), "values of int4 in groups of 32"


def test_plans_and_lists_name_it(page: Path) -> None:
    table = compress("plan", page / "npy.yaml", "--plugin", page / "npy.py")
    assert table.returncode == 0 and "runs in whatever reads numpy's files" in " ".join(table.stdout.split())
    listed = compress("methods", "--plugin", page / "npy.py", "--json")
    methods = json.loads(listed.stdout)
    assert list(methods["containers"])[-1] == "npy"
    takers = {codec["name"]: codec["containers"] for codec in methods["codecs"]}
    assert "npy" in takers["int3-row"] and "npy" in takers["bf16"] and "npy" not in takers["q4_k"]
    assert "whatever reads numpy's files" in compress("methods", "--plugin", page / "npy.py").stdout


def test_what_it_does_not_hold_is_refused(page: Path) -> None:
    recipe = (page / "npy.yaml").read_text().replace("int4-g32", "q4_k")
    (page / "npy.yaml").write_text(recipe)
    result = compress("plan", page / "npy.yaml", "--plugin", page / "npy.py")
    assert result.returncode != 0 and "container npy (export[0]) cannot hold q4_k" in result.stderr


def test_without_the_plugin_the_name_is_unknown(page: Path) -> None:
    result = compress("plan", page / "npy.yaml")
    assert result.returncode != 0 and "unknown container 'npy'" in result.stderr


def test_a_plugin_cannot_take_a_name(page: Path) -> None:
    (page / "taken.py").write_text(block(PAGE, "python").replace('name="npy"', 'name="gguf"'), encoding="utf-8")
    result = compress("plan", page / "npy.yaml", "--plugin", page / "taken.py")
    assert result.returncode != 0 and "already" in result.stderr and "Traceback" not in result.stderr
