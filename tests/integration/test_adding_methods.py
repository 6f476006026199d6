"""docs/adding-a-method.md, executed: a solver, a scaling and a family, one file each, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.pages import sets, write_block
from tests.integration.runs import command, text_file
from tests.tiny import tiny_model

PAGE = "adding-a-method.md"


def test_the_page(
    tmp_path: Path, forget_plugins: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Every command starts from nothing, as in a process of its own."""
    model = tiny_model("qwen3", tmp_path / "model", intermediate_size=128)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "architectures": ["MineForCausalLM"]})
    )
    plugins: list[str] = []
    for name in ("solver", "scaling", "family"):
        plugins += ["--plugin", str(write_block(PAGE, f"python {name}", tmp_path / f"{name}.py"))]
    write_block(PAGE, "yaml", tmp_path / "recipe.yaml", MODEL=model)
    text = text_file(tmp_path / "text.txt")
    small = sets("calibration.samples=4", "calibration.length=64", f"calibration.dataset={text}")
    given = [str(tmp_path / "recipe.yaml"), *plugins, *small]

    def compress(*arguments: str) -> tuple[int, str, str]:
        forget_plugins()
        return command(monkeypatch, capfd, *arguments)

    code, planned, err = compress("plan", *given, "--json")
    assert code == 0, err
    solved = {t["solver"] for t in json.loads(planned)["tensors"] if t["codec"] == "int4-g32"}
    assert solved == {"twice"}
    code, out, err = compress("run", *given, "--output", str(tmp_path / "out"))
    assert code == 0, err + out
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["gate"]["passed"]
    code, _, err = compress("plan", str(tmp_path / "recipe.yaml"), *plugins, "--set", "steps[0].even={fold: nowhere}")
    assert code != 0 and "even" in err
    listed = json.loads(compress("methods", "--json", *plugins)[1])
    assert "twice" in {m["name"] for m in listed["solvers"]} and "even" in {m["name"] for m in listed["steps"]}
