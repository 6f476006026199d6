"""Sizes mean one thing: a plan, a run, a score and a comparison of one model say the same, and what its files say."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from compress.plan import make_plan
from compress.report.advice import advise
from compress.report.compare import Run, compare
from compress.report.compare_data import row_dict
from compress.report.compare_table import CompareTable
from compress.report.numbers import bits, human_bytes, percent
from compress.report.plan_table import plan_table
from compress.report.progress import Reporter
from compress.report.table import scorecard_table
from compress.run.score import Settings, score_targets
from tests.cards import text
from tests.integration.runs import carry_out, small
from tests.tiny import tiny_model

RECIPES = {"gguf-q4-k-m": (), "gptq-w4-g128": ("steps[0].quantize.scheme=W4A16G32",), "reap-25": ()}


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder but the card that a run puts there."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file != path / "README.md"]
    return sum(file.stat().st_size for file in files if file.is_file())


def weights_in(model: Path) -> int:
    """Numbers in a checkpoint."""
    with safe_open(model / "model.safetensors", "np") as file:
        return sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118  (no mapping)


@pytest.mark.parametrize("name", RECIPES)
def test_share_and_bits_are_the_same_everywhere(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = tiny_model("qwen3_moe", tmp_path / "model", num_experts=4)
    (model / "modeling_custom.py").write_text("# " + 10_000 * "no part of what is needed to run it")
    needed = size(model) - size(model / "modeling_custom.py")
    suite = tmp_path / "suite.yaml"
    suite.write_text("{name: one, text: wikipedia, windows: 1, length: 32}\n")
    recipe = small(name, model, tmp_path / "out", f"score={{suite: {suite}}}", *RECIPES[name])
    plan, card = make_plan(recipe, weights=True), carry_out(recipe)
    assert card.base.bytes == plan.original_bytes == needed
    assert card.base.weight_bytes == plan.source_bytes == size(model / "model.safetensors")
    for artifact in card.artifacts:
        path, planned = tmp_path / "out" / artifact.path, plan.artifact_bytes[artifact.container]
        weights = size(path) if path.is_file() else sum(size(file) for file in path.glob("*.safetensors"))
        share, each = size(path) / needed, 8 * weights / weights_in(model)
        assert (artifact.bytes, artifact.ratio) == (size(path), share)
        assert artifact.bits_per_weight == pytest.approx(each, abs=1e-4)
        assert planned == pytest.approx(size(path), rel=0.02)
        assert 8 * plan.file_bytes[artifact.container] / plan.original_parameters == pytest.approx(each, rel=0.02)
        (scored,) = score_targets([str(path)], str(model), Settings(str(suite)), Reporter(0))
        assert (scored.base.bytes, scored.artifacts[0].bytes) == (needed, size(path))
        assert (scored.artifacts[0].ratio, scored.artifacts[0].bits_per_weight) == (share, artifact.bits_per_weight)
        comparison = compare([Run(card), Run(scored)])
        assert not comparison.warnings, "one original"
        rows = [row_dict(row) for row in comparison.variants if row.container == artifact.container]
        assert {(row["bytes"], row["share"], row["bits_per_weight"]) for row in rows} == {
            (size(path), share, artifact.bits_per_weight)
        }
        for shown in (text(scorecard_table(card), 120), text(CompareTable(comparison, advise(comparison)), 120)):
            assert all(figure in shown for figure in (human_bytes(size(path)), percent(share), bits(each)))
            assert "share of" in shown and "bits per" in shown
        told = " ".join(text(plan_table(plan), 120).split())
        sizes = f"{human_bytes(planned)}, {bits(8 * plan.file_bytes[artifact.container] / plan.original_parameters)}"
        assert f"{sizes} bits per weight, {percent(planned / needed)} of the original" in told


def test_cards_of_earlier_versions_compare_with_new_ones() -> None:
    """Their bytes of the original were those of its weight files."""
    from tests.cards import card

    old, new = card("old", 5_000_000, 0.1), card("new", 4_000_000, 0.2)
    assert old.base.bytes is not None and old.base.weight_bytes is None
    base = new.base.model_copy(update={"bytes": old.base.bytes + 300_000, "weight_bytes": old.base.bytes})
    comparison = compare([Run(old), Run(new.model_copy(update={"base": base}))])
    assert not comparison.warnings and len(comparison.originals) == 1


def test_a_gguf_as_the_original_is_its_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = tiny_model("llama", tmp_path / "model", hidden_size=128, intermediate_size=128, dtype="bfloat16")
    carry_out(small("gguf-q4-k-m", model, tmp_path / "first", "steps=[]"))
    (file,) = (tmp_path / "first").glob("*.gguf")
    plan = make_plan(small("gguf-q4-k-m", file, tmp_path / "second"), weights=True)
    assert plan.original_bytes == plan.source_bytes == size(file)
