"""docs/adding-a-codec.md, executed: the file and the recipe on that page make a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress import plugins
from compress.errors import CheckpointError
from tests.integration.pages import block, compress, sets, write_block
from tests.integration.runs import SMALL, command, demo_blocks, text_file

PAGE = "adding-a-codec.md"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_block(PAGE, "python", tmp_path / "e2m1_g32.py")
    write_block(PAGE, "yaml", tmp_path / "e2m1.yaml")
    return tmp_path


def test_the_page(
    page: Path, forget_plugins: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """On one block of the demo model, without the solver's sweeps. It is loaded where nothing but the file has run."""
    from transformers import AutoModelForCausalLM

    model, text = demo_blocks(page / "model", 1, 4), text_file(page / "text.txt")
    small = sets(*SMALL, f"calibration.dataset={text}", "steps[0].quantize.solver.sweeps=0")
    plugin = str(page / "e2m1_g32.py")
    given = ("--plugin", plugin, "--model", str(model), "--output", str(page / "out"), *small)
    code, out, err = command(monkeypatch, capfd, "run", str(page / "e2m1.yaml"), *given)
    assert code == 0, err + out
    card = json.loads((page / "out" / "scorecard.json").read_text())
    assert card["gate"]["passed"]
    (artifact,) = card["artifacts"]
    folder = page / "out" / artifact["path"]
    forget_plugins()
    speak = ("generate", str(folder), "the", "--tokens", "2")
    code, _, err = command(monkeypatch, capfd, *speak)
    assert code != 0 and "codec 'e2m1-g32' is not known" in err
    code, said, err = command(monkeypatch, capfd, *speak, "--plugin", plugin)
    assert code == 0 and said.startswith("the"), err
    forget_plugins()
    with pytest.raises(CheckpointError, match="e2m1-g32"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plugins.load(plugin)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.isfinite(loaded(torch.arange(16)[None]).logits).all()


def test_without_the_plugin_the_name_is_unknown(page: Path) -> None:
    result = compress("plan", str(page / "e2m1.yaml"))
    assert result.returncode != 0 and "unknown codec 'e2m1-g32'" in result.stderr


def test_a_plugin_cannot_take_a_name(
    page: Path, forget_plugins: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (page / "taken.py").write_text(block(PAGE, "python").replace("e2m1-g32", "q4_k"), encoding="utf-8")
    arguments = ("plan", str(page / "e2m1.yaml"), "--plugin", str(page / "taken.py"))
    code, _, err = command(monkeypatch, capfd, *arguments)
    assert code != 0 and "already" in err and "Traceback" not in err
