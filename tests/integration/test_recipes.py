"""Every family through every container, read back by other programs; every shipped recipe is carried out in tests/golden.

The demo model is cut to its first blocks and the solvers do no sweeps: what is tested is the chain of parts, the
solvers have their own tests. Outputs are proved by transformers (which computes the decoded weights) and llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.containers import gguf as gguf_container
from compress.errors import PlanError
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.recipe import Recipe, bundled_recipes
from compress.run import run
from tests.integration.delivery import check_delivery, prove_gguf
from tests.integration.runs import carry_out, cheap, demo_blocks, kept, small
from tests.tiny import FAMILIES, OTHER_MIXERS, tiny_model

RECIPES = sorted(bundled_recipes())
PLAIN = [family for family in FAMILIES if family not in OTHER_MIXERS]
MOE = [family for family in PLAIN if "moe" in family or family == "mixtral"]
DENSE = [family for family in PLAIN if family not in MOE]


def prove_run(recipe: Recipe, work: Path) -> None:
    """A run to one GGUF: it is delivered as planned, and llama.cpp computes it."""
    card, plan = carry_out(recipe), make_plan(recipe)
    check_delivery(plan, card)
    prove_gguf(Path(recipe.output) / card.artifacts[0].path, plan.spec, work)


# --- the demo model (every recipe on it: tests/golden) -----------------------------------------------


def test_recipe_as_shipped_is_scored(tmp_path: Path) -> None:
    """One run with its suite: base and artifact scores, on the same windows."""
    demo = demo_blocks(tmp_path / "model", 1)
    suite = tmp_path / "suite.yaml"
    suite.write_text("{name: few, text: wikipedia, windows: 2, length: 64}\n")
    recipe = small("rtn-w4-g128", demo, tmp_path / "out", f"score={{suite: {suite}}}")
    card = carry_out(recipe)
    scores = card.artifacts[0].scores
    assert scores is not None and scores.kld is not None and card.base.scores is not None
    assert 0 < scores.kld.mean < 1
    assert scores.perplexity.value > 1
    saved = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert {"model", "recipe", "artifacts", "base", "experts", "fallbacks", "gate", "stages"} <= set(saved)
    assert {"perplexity", "kld", "top1_agreement"} <= set(saved["artifacts"][0]["scores"])
    assert [e["layer"] for e in saved["experts"]] == [0]
    assert sum(saved["experts"][0]["tokens"]) == 4 * 64 * 2  # every token has two experts


# --- GGUF of every family -------------------------------------------------------------------------------

FAMILY_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1,
               "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"hidden_size": 96, "num_key_value_heads": 1}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"hidden_size": 256, "intermediate_size": 288, "num_key_value_heads": 4}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"hidden_size": 72, "moe_intermediate_size": 40, "tie_word_embeddings": True}),
    ("mixtral", {}),
]  # fmt: skip


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in FAMILY_CASES} == set(PLAIN)


@pytest.mark.parametrize(("family", "config"), FAMILY_CASES, ids=[family for family, _ in FAMILY_CASES])
def test_family_as_q4_k_m(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model", **config)
    prove_run(small("gguf-q4-k-m", model, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("family", MOE)
def test_experts_at_two_bits(family: str, tmp_path: Path) -> None:
    """Rows of 256, so that the lattice and Q2_K are really used."""
    narrow = {"intermediate_size": 32} if family == "mixtral" else {}
    model = tiny_model(family, tmp_path / "model", hidden_size=256, num_hidden_layers=1, **narrow)
    recipe = small("qwen-moe-2bit", model, tmp_path / "out", *cheap("qwen-moe-2bit"))
    prove_run(recipe, tmp_path)
    types = {codec for codec, _ in gguf_container.inventory(tmp_path / "out" / "qwen-moe-2bit.gguf").values()}
    assert "iq2_xxs" in types and "q8_0" in types and "f32" in types


def test_expert_recipe_on_a_dense_model(tmp_path: Path) -> None:
    """Rules for experts match nothing and the run says so; all else is done."""
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = small("qwen-moe-2bit", model, tmp_path / "out")
    card = carry_out(recipe)
    assert card.gate.passed
    assert any("routed_experts" in note for note in card.notes)


# --- GPTQ folders -------------------------------------------------------------------------------


def unpack_gptq(folder: Path, module: str) -> torch.Tensor:
    """One linear of a 4-bit GPTQ folder, [out, in] float32, by the format's description and no code of the project."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        words, zeros, scales, groups = (
            file.get_tensor(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
        )
    shifts = np.arange(0, 32, 4)
    codes = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])
    points = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1) + 1
    return torch.from_numpy((codes - points[groups]).astype(np.float32) * scales.astype(np.float32)[groups]).T


@pytest.mark.parametrize("family", DENSE)
def test_gptq_folder_holds_the_solved_values(family: str, tmp_path: Path) -> None:
    tied = family in ("qwen2", "qwen3")
    model = tiny_model(family, tmp_path / "model", hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    recipe = small("gptq-w4-g128", model, tmp_path / "out")
    card = run(recipe, keep_work=True)
    assert card.gate.passed
    folder = tmp_path / "out" / card.artifacts[0].path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)
    solved = kept(recipe)
    modules = [n.removesuffix(".weight") for n in solved if n.endswith("_proj.weight")]
    assert len(modules) == 2 * 7
    for module in modules:
        assert torch.equal(unpack_gptq(folder, module), solved[f"{module}.weight"]), module
    stored = Checkpoint.open(folder)
    for name in set(solved) - {f"{module}.weight" for module in modules}:
        assert torch.equal(stored.load(name).float(), solved[name]), name


def test_gptq_and_rtn_differ_only_in_codes(tmp_path: Path) -> None:
    """The control spends the same bytes, and error feedback beats it on the inputs it was given."""
    model = tiny_model("llama", tmp_path / "model", hidden_size=128, intermediate_size=128)
    cards = {n: carry_out(small(n, model, tmp_path / n)) for n in ("gptq-w4-g128", "rtn-w4-g128")}
    sizes = {n: (tmp_path / n / c.artifacts[0].path / "model.safetensors").stat().st_size for n, c in cards.items()}
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("name", [n for n in RECIPES if "w4-g128" in n])
def test_smaller_groups_stand_in_where_128_columns_do_not_divide_a_row(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", hidden_size=192, intermediate_size=256, head_dim=32)
    card = carry_out(small(name, model, tmp_path / "out", *cheap(name)))
    assert card.gate.passed, card.gate
    assert {(f.role, f.wanted[:9], f.used[:8]) for f in card.fallbacks} >= {("attention.q", "int4-g128", "int4-g64")}


@pytest.mark.parametrize("name", [n for n in RECIPES if "w4-g128" in n])
def test_rows_that_do_not_divide_are_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path / "model", hidden_size=72)

    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "load", forbidden)
    with pytest.raises(PlanError) as error:
        carry_out(small(name, model, tmp_path / "out"))
    assert "do not divide into groups of 128" in str(error.value)
    assert "q_proj" in str(error.value) and "int4-row" in str(error.value)
    assert not (tmp_path / "out").exists()
