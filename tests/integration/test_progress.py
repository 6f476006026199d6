"""Stages of a whole run say how far they are, steadily, from their first step to their last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from compress.report.progress import Reporter, StageProgress
from compress.run.score import Settings, score_targets
from tests.integration.runs import carry_out, small
from tests.tiny import tiny_model


class Recording(Reporter):
    """Keeps what every stage says."""

    def __init__(self) -> None:
        super().__init__(0)
        self.said: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str, *, told: bool = True) -> Iterator[StageProgress]:
        with super().stage(name, told=told) as progress:
            said = self.said.setdefault(name, [])

            class Kept(StageProgress):
                def __call__(self, done: float, detail: str | None = None) -> None:
                    said.append(done)
                    progress(done, detail)

            yield Kept(name, None, None)


def require_steady(said: list[float], name: str, widest: float) -> None:
    assert said and said == sorted(said) and said[-1] == pytest.approx(1), name
    assert max(np.diff([0.0, *said])) <= widest, f"{name} stands still: {said}"


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_bars_of_a_run_never_stand_still(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    model = tiny_model("qwen3_moe", tmp_path / "model", num_experts=4, num_hidden_layers=4)
    (suite := tmp_path / "suite.yaml").write_text("{name: four, text: wikipedia, windows: 4, length: 32}\n")
    recipe = small("gguf-q4-k-m", model, tmp_path / "out", f"export=[{{container: {container}}}]",
                   f"score={{suite: {suite}}}")  # fmt: skip
    reporter = Recording()
    card = carry_out(recipe, reporter=reporter)
    steps = {"check weights": 0.4, "blocks": 0.1, f"write {container}": 0.3, f"check {container}": 0.3}
    for name, widest in {**steps, f"score {container}": 0.3}.items():
        require_steady(reporter.said[name], name, widest)
    assert [stage.name for stage in card.stages] == list(reporter.said), "every stage is counted"
    alone = Recording()
    path = str(tmp_path / "out" / card.artifacts[0].path)
    score_targets([path], str(model), Settings(str(suite), remember=False), alone)
    require_steady(alone.said[f"score {Path(path).name}"], "score", 0.3)
