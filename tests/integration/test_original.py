"""The original on trial: what speaks against a checkpoint is told before the work, in the scorecard, and stops a strict run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError, GateFailed
from compress.recipe import load_recipe
from compress.recipe.schema import Recipe
from compress.report.progress import Reporter
from compress.run import run
from compress.run.score import Settings, score_targets
from compress.scoring.divergence import frequency_perplexity
from tests.integration.runs import JUDGED, demo_blocks, final_names, text_file
from tests.tiny import demo_model, tiny_model


def _changed(model: Path, **tensors: torch.Tensor) -> Path:
    file = model / "model.safetensors"
    save_file(
        {**load_file(file), **{k.replace("__", "."): v for k, v in tensors.items()}}, file, metadata={"format": "pt"}
    )
    return model


def _suite(folder: Path, text: str = "wikipedia") -> Path:
    path = folder / "suite.yaml"
    path.write_text(f"{{name: s, text: {text}, windows: 2, length: 128}}\n")
    return path


def _recipe(model: Path, folder: Path, score: Path | None = None) -> Recipe:
    path = folder / "r.yaml"
    suite = "false" if score is None else f"{{suite: {score}}}"
    path.write_text(f"name: r\nmodel: {model}\nsteps: []\nexport: [{{container: safetensors}}]\nscore: {suite}\n")
    return load_recipe(path, output=str(folder / "out"))


@pytest.mark.parametrize(("value", "word"), [(0.0, "all zero"), (0.25, "all one value")])
def test_matrices_of_one_value_are_told_and_stop_a_strict_run(value: float, word: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    dead = torch.full_like(load_file(model / "model.safetensors")[name], value)
    recipe = _recipe(_changed(model, **{name: dead}), tmp_path)
    with pytest.raises(CheckpointError, match=word):
        run(recipe, strict=True)
    assert final_names(tmp_path / "out") == set()
    card = run(recipe)
    assert [note for note in card.notes if word in note and name in note]


def test_one_dead_expert_of_a_fused_stack_is_found(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5_moe_text", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(n for n, w in weights.items() if w.ndim == 3)
    stack = weights[name].clone()
    stack[1] = 0
    with pytest.raises(CheckpointError, match="all zero"):
        run(_recipe(_changed(model, **{name: stack}), tmp_path), strict=True)


def test_nan_in_the_last_layer_is_found_before_the_first_is_solved(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    norm = torch.full((64,), float("nan"))
    _changed(model, **{"model.norm.weight": norm[: len(load_file(model / "model.safetensors")["model.norm.weight"])]})
    reporter = Reporter(0)
    with pytest.raises(CheckpointError, match="model.norm.weight .*NaN"):
        run(_recipe(model, tmp_path), reporter=reporter)
    assert [stage.name for stage in reporter.stages] == ["plan", "tokenizer", "check weights"]


def test_left_out_tensors_stop_a_strict_run(tmp_path: Path) -> None:
    model = _changed(tiny_model("llama", tmp_path / "model"), **{"score.weight": torch.ones(1, 64)})
    recipe = _recipe(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        run(recipe, strict=True)
    assert any("score.weight" in note for note in run(recipe).notes)


def test_a_model_that_knows_no_language_is_told_from_one_that_does(tmp_path: Path) -> None:
    """The demo model is trained; a random one does worse than token frequencies."""
    suite = _suite(tmp_path)
    random = tiny_model("llama", tmp_path / "random")
    card = run(_recipe(random, tmp_path, suite))
    assert any("cannot predict this text" in note for note in card.notes)
    (tmp_path / "strict").mkdir()
    with pytest.raises(GateFailed, match="cannot predict"):
        run(_recipe(random, tmp_path / "strict", suite), strict=True)
    assert final_names(tmp_path / "strict" / "out") == {"rejected", *JUDGED}
    good = score_targets([str(demo_model())], str(demo_model()), Settings(str(suite), strict=True), Reporter(0))[0]
    assert good.gate.passed and not good.notes


def test_an_unrelated_original_is_told(tmp_path: Path) -> None:
    """Four tokens in ten are no kinship: weights decide, unless predictions agree."""
    suite = _suite(tmp_path)
    other = tiny_model("qwen3_moe", tmp_path / "other", **json.loads((demo_model() / "config.json").read_text()))
    card = score_targets([str(demo_model())], str(other), Settings(str(suite)), Reporter(0))[0]
    assert any("little in common" in note for note in card.notes) and card.gate.passed
    assert not score_targets([str(demo_model())], str(other), Settings(str(suite), strict=True), Reporter(0))[
        0
    ].gate.passed
    cut = demo_blocks(tmp_path / "cut", 1)  # the same weights, other predictions
    assert not any(
        "little in common" in n
        for n in score_targets([str(cut)], str(demo_model()), Settings(str(suite)), Reporter(0))[0].notes
    )


def test_frequencies() -> None:
    """Uniform draws from k tokens: the entropy is log k, as far as the draws tell."""
    ids = np.random.default_rng(0).integers(0, 50, (40, 65))
    assert frequency_perplexity(ids) == pytest.approx(50, rel=0.02)
    assert frequency_perplexity(np.full((2, 9), 7)) == 1.0


def test_nothing_that_ships_says_where_it_was_made(tmp_path: Path) -> None:
    """Not the model's folder, nor the text's, nor the suite's, nor what the source's own settings had noted."""
    model = tiny_model("qwen3_moe", tmp_path / "secret-place" / "model", num_experts=3)
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((model / name).read_text())
        key = "_name_or_path" if name == "config.json" else "name_or_path"
        (model / name).write_text(json.dumps({**data, key: "/home/someone/run7"}))
    text = text_file(tmp_path / "secret-place" / "words.txt")
    suite = tmp_path / "secret-place" / "own.yaml"
    suite.write_text("{name: own, text: wikipedia, windows: 2, length: 64}\n")
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nmodel: x\nsteps: [{prune_experts: {ratio: 0.34}}, "
        "{quantize: {solver: gptq, rules: [{targets: [attention, routed_experts], codec: int4-g32}]}}]\n"
        f"calibration: {{dataset: {text}, samples: 4, length: 64}}\nscore: {{suite: {suite}}}\n"
        "export: [{container: compress}, {container: safetensors}]\n"
    )
    run(load_recipe(path, model=str(model), output=str(tmp_path / "out")))
    shipped = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(shipped) > 8
    for file in shipped:
        data = file.read_bytes()
        for word in (b"secret-place", b"someone", str(tmp_path).encode()):
            assert word not in data, (file.name, word)
