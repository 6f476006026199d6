"""Rehearsals of recipes whose blocks are more than quantized: they do not fail, and every step takes its time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from compress.plan import make_plan
from compress.run import rehearse as module
from compress.run.rehearse import rehearse
from tests.integration.runs import small
from tests.tiny import tiny_model

RECIPE = """
model: m
steps:
{steps}
  - quantize: {{solver: {{name: gptq, sweeps: 0, refits: 0}}, scheme: {scheme}}}
{recover}
export: [{{container: gguf}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("model") / "model")


def seconds(
    model: Path, where: Path, steps: str, recover: str = "", *overrides: str, scheme: str = "Q8_0"
) -> dict[str, float]:
    file = where / "r.yaml"
    file.write_text(RECIPE.format(steps=steps, recover=recover, scheme=scheme))
    sets = ("calibration.samples=24", *overrides)
    return dict(rehearse(make_plan(small(file, model, where / "out", *sets), weights=True)).parts)


SHRINKING = (
    "  - drop_layers: {count: 1}\n  - prune_experts",
    "  - rotate\n  - prune_structured: {heads: 0.5, channels: 0.25}",
    "  - prune: {solver: {name: sparsegpt, sweeps: 1}, sparsity: 0.5}",
    "  - prune: {solver: {name: sparsegpt, sweeps: 1}, sparsity: 0.5, allocation: outliers}",
    "  - factorize: {solver: {name: compot, iterations: 1, rounds: 1}, ratio: 0.2}",
)


@pytest.mark.parametrize("steps", SHRINKING)
def test_what_makes_a_model_smaller_can_be_rehearsed(model: Path, tmp_path: Path, steps: str) -> None:
    found = seconds(model, tmp_path, steps, "", "export=[{container: compress}]", scheme="W8A16")
    assert all(found[part] > 0 for part in ("forward", "solve", "write"))


@pytest.mark.parametrize("steps", ["  - awq", "  - smooth", "  - rotate", "  - rotate\n  - awq: {grid: 2}"])
def test_every_step_can_be_rehearsed(model: Path, tmp_path: Path, steps: str) -> None:
    found = seconds(model, tmp_path, steps)
    assert all(found[part] > 0 for part in ("forward", "solve", "write"))


def test_recovery_counts_with_its_epochs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that takes a tenth of a second for the rehearsed windows, in every block."""
    asked = []

    def slow(*arguments: object, **_: object) -> None:
        asked.append(arguments[3])
        time.sleep(0.1)

    monkeypatch.setattr(module, "recover_block", slow)
    recover = "  - recover: {loss: mse, epochs: 7, end_to_end: 3}"
    plain = seconds(model, tmp_path, "")["solve"]
    more = seconds(model, tmp_path, "", recover)["solve"]
    (options,) = asked  # both blocks are of one kind
    assert options.epochs == 1
    assert more - plain == pytest.approx(2 * 10 * 0.1, rel=0.5)  # two blocks, seven epochs and three of all together


def test_a_real_recovery_can_be_rehearsed(model: Path, tmp_path: Path) -> None:
    assert seconds(model, tmp_path, "  - awq: {grid: 2}", "  - recover")["solve"] > 0
