"""tensors.jsonl: a line a tensor, errors held against the file that was delivered; -v shows the same live."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.containers import CONTAINERS
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.report.scorecard import read
from compress.run import load_calibration
from tests.integration.runs import carry_out, command, small, text_file
from tests.tiny import tiny_model

RECIPE = "{model: m, steps: [{quantize: {solver: SOLVER, scheme: SCHEME}}], export: [{container: CONTAINER}]}"


def recipe(path: Path, solver: str, scheme: str, container: str) -> Path:
    path.write_text(RECIPE.replace("SOLVER", solver).replace("SCHEME", scheme).replace("CONTAINER", container))
    return path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "tensors.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("records") / "model", dtype="bfloat16")


def test_errors_are_those_of_the_file(model: Path, tmp_path: Path) -> None:
    """The table's are plain; the first queries' are on what they read: the normed rows of the text's tokens, as delivered."""
    made = small(recipe(tmp_path / "rtn.yaml", "rtn", "Q4_K_S", "gguf"), model, tmp_path / "out")
    (artifact,) = carry_out(made).artifacts
    plan, found = make_plan(made), {record["name"]: record for record in records(tmp_path / "out")}
    assert list(found) == [tensor.name for tensor in plan.spec.tensors()]
    solved = {record["role"] for record in found.values() if "error" in record}
    assert {record["role"] for record in found.values()} - solved == {"norms", "router"}
    delivered = CONTAINERS["gguf"].open_dense(tmp_path / "out" / artifact.path, plan.spec)
    original = Checkpoint.open(model).load

    def error(name: str, inputs: torch.Tensor | None = None) -> float:
        whole = original(name).double()
        parts = [whole - delivered(name).double(), whole]
        lost, energy = (float((part if inputs is None else inputs @ part.T).square().sum()) for part in parts)
        return lost / energy

    table, queries = plan.spec.embeddings, "model.layers.0.self_attn.q_proj.weight"
    assert found[table]["error"] == pytest.approx(error(table), rel=1e-3) and found[table]["tokens"] is None
    rows = delivered(table).double()[torch.from_numpy(load_calibration(plan)).long().reshape(-1)]
    rows *= (rows.square().mean(-1, keepdim=True) + plan.spec.norm_eps).rsqrt()
    inputs = rows * original("model.layers.0.input_layernorm.weight").double()
    assert found[queries]["error"] == pytest.approx(error(queries, inputs), rel=1e-3)
    assert (found[queries]["tokens"], found[queries]["solver"], found[queries]["wanted"]) == (len(rows), "rtn", "q4_k")
    assert all(record["seconds"] >= 0 for record in found.values() if "error" in record)


def test_lines_of_a_calibrated_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Their errors are what the scorecard sums up, and -v showed them."""
    made = recipe(tmp_path / "gptq.yaml", "gptq", "Q4_K_S", "gguf")
    text = text_file(tmp_path / "text.txt")
    code, _, err = command(
        monkeypatch, capfd, "run", str(made), "--model", str(model), "--output", str(tmp_path / "out"), "-v",
        *(part for pair in (f"dataset={text}", "samples=4", "length=64", "score=false") for part in ("--set", pair)),
    )  # fmt: skip
    assert code == 0
    found, card = records(tmp_path / "out"), read(tmp_path / "out")
    solved = [record for record in found if "error" in record]
    for record in solved:
        assert f"{record['name']}: {record['solver']} -> {record['codec']}, error {record['error']:.3g}" in err
    experts = [r for r in solved if r["expert"] is not None and r["role"] == "routed_experts.gate" and r["layer"] == 0]
    assert [r["tokens"] for r in experts] == list(next(layer.tokens for layer in card.experts if layer.layer == 0))
    line = next(e for e in card.errors if e.layer == 0 and e.role == "routed_experts.gate")
    energies = torch.tensor([r["energy"] for r in experts], dtype=torch.float64)
    errors = torch.tensor([r["error"] for r in experts], dtype=torch.float64)
    assert line.error == pytest.approx(float((energies * errors).sum() / energies.sum()), rel=1e-4)
