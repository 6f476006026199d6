"""docs/adding-a-method.md, executed: a solver, a scaling and a family, one file each, in one run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.integration.runs import text_file
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def test_the_page(tmp_path: Path) -> None:
    model = tiny_model("qwen3", tmp_path / "model", intermediate_size=128)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "architectures": ["MineForCausalLM"]})
    )
    plugins: list[str] = []
    for name in ("solver", "scaling", "family"):
        (code,) = re.findall(rf"```python {name}\n(.*?)```", PAGE, re.DOTALL)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        plugins += ["--plugin", str(tmp_path / f"{name}.py")]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe.replace("MODEL", str(model)), encoding="utf-8")
    text = text_file(tmp_path / "text.txt")
    sets = ("calibration.samples=4", "calibration.length=64", f"calibration.dataset={text}")
    given = [str(tmp_path / "recipe.yaml"), *plugins, *(part for item in sets for part in ("--set", item))]

    def compress(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "compress.cli", *arguments]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)

    planned = compress("plan", *given, "--json")
    assert planned.returncode == 0, planned.stderr
    solved = {t["solver"] for t in json.loads(planned.stdout)["tensors"] if t["codec"] == "int4-g32"}
    assert solved == {"twice"}
    result = compress("run", *given, "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr + result.stdout
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["gate"]["passed"]
    wrong = compress("plan", str(tmp_path / "recipe.yaml"), *plugins, "--set", "steps[0].even={fold: nowhere}")
    assert wrong.returncode != 0 and "even" in wrong.stderr
    listed = json.loads(compress("methods", "--json", *plugins).stdout)
    assert "twice" in {m["name"] for m in listed["solvers"]} and "even" in {m["name"] for m in listed["steps"]}
