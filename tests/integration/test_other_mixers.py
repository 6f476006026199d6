"""Blocks beyond grouped-query attention, from a recipe to the engine: gated DeltaNet hybrids and latent attention.

The gate is the proof: every tensor read back against what was solved, and the logits of llama.cpp (or of the decoded
weights) beside those of the model in memory. That the forward is transformers' own, and that llama.cpp computes it,
is proved in float32 by the contract of families and by test_gguf_container.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.decode import decode
from compress.engines.transformers import TransformersSource
from compress.errors import PlanError
from compress.models.checkpoint import Checkpoint
from compress.plan import make_plan
from compress.solve.tensor import solve_tensor
from compress.statistics import Moments, blend
from tests.integration.containers import reference_logits, spec_of, token_ids
from tests.integration.runs import SMALL, carry_out, cheap, small
from tests.proofs import proved
from tests.tiny import FAMILIES, FOR_LLAMA_CPP, OTHER_MIXERS, tiny_model

WIDE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_value_head_dim": 32, "linear_key_head_dim": 32, "shared_expert_intermediate_size": 256},
    "qwen3_5_moe_text": {
        "linear_value_head_dim": 32,
        "linear_key_head_dim": 32,
        "shared_expert_intermediate_size": 256,
    },
    "qwen3_5_text": {"linear_value_head_dim": 32, "linear_key_head_dim": 32, "intermediate_size": 256},
    "deepseek_v2": {"kv_lora_rank": 128, "v_head_dim": 32, "qk_rope_head_dim": 32, "intermediate_size": 256},
    "deepseek_v3": {
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "v_head_dim": 32,
        "qk_rope_head_dim": 32,
        "intermediate_size": 256,
    },
    "lfm2": {"intermediate_size": 384, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0},
    "lfm2_moe": {"num_dense_layers": 0},
    "granitemoe": {"intermediate_size": 256},
    "granitemoehybrid": {
        "mamba_n_heads": 32,
        "mamba_d_state": 16,
        "intermediate_size": 256,
        "shared_intermediate_size": 256,
    },
    "nemotron_h": {
        "mamba_num_heads": 32,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 256,
    },
    "glm4_moe_lite": {
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "v_head_dim": 32,
        "qk_rope_head_dim": 32,
        "intermediate_size": 256,
    },
    "deepseek_v32": {"kv_lora_rank": 128, "q_lora_rank": 128, "v_head_dim": 32, "qk_rope_head_dim": 32},
    "exaone4": {"intermediate_size": 256},
    "solar_open": {},
    "glm_moe_dsa": {"kv_lora_rank": 128, "q_lora_rank": 128, "v_head_dim": 32, "qk_rope_head_dim": 32},
    "glm4_moe": {"intermediate_size": 256},
    "dots1": {"head_dim": 32, "intermediate_size": 256},
    "minimax_m2": {"intermediate_size": 256},
    "olmoe": {"intermediate_size": 256},
    "gpt_oss": {"intermediate_size": 256},
    "mimo_v2_flash": {"head_dim": 96, "intermediate_size": 256, "layer_types": ["full_attention", "sliding_attention"]},
    "afmoe": {"intermediate_size": 256},
    "hy_v3": {"intermediate_size": 256},
    "llama4_text": {"intermediate_size": 256, "intermediate_size_mlp": 256, **FOR_LLAMA_CPP["llama4_text"]},
    "phi3": {"intermediate_size": 256},
    **{name: {"intermediate_size": 256} for name in ("smollm3", "seed_oss", "ministral3", "ernie4_5")},
    **{name: {"intermediate_size": 256} for name in ("ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64, "intermediate_size": 256},
    **{
        name: {"head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 256}
        for name in ("gemma2", "gemma3_text")
    },
    **{family: {"intermediate_size": 256} for family in ("olmo2", "olmo3", "granite")},
}
"""Widths that blocks of 256 and groups of 128 divide."""
KINDS: dict[str, dict[str, Any]] = {
    **{family: {"full_attention_interval": 2} for family in ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")},
    **{family: {"num_hidden_layers": 4} for family in ("smollm3", "afmoe", "llama4_text")},
    **{family: {"layer_types": ["conv", "full_attention"]} for family in ("lfm2", "lfm2_moe")},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
}
"""One layer of each kind."""


@pytest.fixture(scope="module", params=OTHER_MIXERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, known = request.param, FAMILIES[request.param][1]
    few: dict[str, Any] = {"num_hidden_layers": 2} | KINDS.get(family, {})
    few |= {key: size for key, size in (("moe_intermediate_size", 256), ("num_experts", 4)) if key in known}
    folder = tmp_path_factory.mktemp(family) / "model"  # llama.cpp wants certain tokens of what is called Phi-3
    return tiny_model(family, folder, hidden_size=256, **few, **WIDE[family])


@pytest.mark.parametrize("name", ["qwen-moe-2bit", "gptq-w4-g128"])
def test_recipe(name: str, model: Path, tmp_path: Path) -> None:
    sets = ["calibration.samples=2", *cheap(name)]
    if name == "gptq-w4-g128" and any(t.declared.stacked for t in spec_of(model).tensors()):
        with pytest.raises(PlanError, match="engines keep this model's routed experts stacked"):
            make_plan(small(name, model, tmp_path / "out", *sets))
        sets.append("export=[{container: safetensors}]")  # which transformers runs: its experts are stacked again
    recipe = small(name, model, tmp_path / "out", *sets)
    plan = make_plan(recipe)
    card = carry_out(recipe)
    assert card.gate.passed, card.gate
    solved = {t.spec.role for t in plan.tensors if t.method is not None}
    assert "attention.o" in solved and solved & {"attention.qkv", "attention.q_a", "attention.kv_a", "attention.q"}
    assert {t.codec for t in plan.tensors if t.spec.role == "small"} <= {"f32"}
    proved(plan.spec.model_type, "recipe", recipe=name, containers=[a.container for a in card.artifacts])


def test_bounded_scores_are_in_the_engine_too(tmp_path: Path) -> None:
    """Gemma 2's, which transformers' usual attention leaves out."""
    model, ids = tiny_model("gemma2", tmp_path / "model"), token_ids()
    (ours,) = TransformersSource(model).logits([ids])
    expected = reference_logits(model, ids)
    assert np.abs(ours - expected).max() < 1e-4 * expected.std()


def test_scaled_embeddings_stay_packed(tmp_path: Path) -> None:
    """transformers scales Gemma's in their module, which a packed one replaces; the gate compares its logits with ours."""
    wide = {**WIDE["gemma3_text"], "hidden_size": 256, "tie_word_embeddings": True}
    model = tiny_model("gemma3_text", tmp_path / "model", **wide)
    packed = ("export=[{container: compress}]", "steps[0].quantize.rules=[{targets: embeddings, codec: int8-g32}]")
    recipe = small("rtn-w4-g128", model, tmp_path / "out", *packed)
    plan = make_plan(recipe)
    assert plan.by_name[plan.spec.embeddings].codec == "int8-g32"
    card = carry_out(recipe)
    assert card.gate.passed, card.gate


def test_columns_in_another_order_are_solved_in_it(tmp_path: Path) -> None:
    """llama.cpp orders the value heads of Qwen3.5 otherwise; the codes of out_proj are those of its reordered weight and
    gram, and what ships decodes to the checkpoint's order."""
    model = tiny_model(
        "qwen3_5_text", tmp_path / "model", hidden_size=256, linear_key_head_dim=32, linear_value_head_dim=32
    )
    plan = make_plan(small("gguf-q4-k-m", model, tmp_path / "out"))
    name = "model.layers.0.linear_attn.out_proj.weight"
    planned, weight = plan.by_name[name], Checkpoint.open(model).load(name).float()
    heads, groups, run = 8, 2, 32
    order = torch.tensor(
        [(g * (heads // groups) + e) * run + i for e in range(4) for g in range(2) for i in range(run)]
    )
    assert planned.ordered
    x = torch.randn(600, weight.shape[1], generator=torch.Generator().manual_seed(0)) * torch.rand(weight.shape[1])
    moments, turned = Moments.zeros(weight.shape[1]), Moments.zeros(weight.shape[1])
    moments.add(x)
    turned.add(x[:, order])
    outcome = solve_tensor(planned, weight, blend(moments, None, 0.0))
    options = planned.solver
    assert options is not None
    alone = options.implementation.solve(
        weight[:, order], blend(turned, None, 0.0).gram, outcome.solution.codec, options
    )
    assert torch.equal(outcome.pack().parts["blocks"], alone.pack().parts["blocks"])
    assert torch.equal(decode(outcome.pack())[:, order], alone.decode())


def test_containers_of_two_orders_are_refused_together(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5_text", tmp_path / "model", hidden_size=256)
    both = "export=[{container: gguf}, {container: compress}]"
    with pytest.raises(PlanError, match="a recipe of its own"):
        make_plan(small("gguf-q4-k-m", model, tmp_path / "out", both))


def test_fused_experts_are_read(tmp_path: Path) -> None:
    """Checkpoints that hold all experts of a layer in one tensor give the same weights as those that do not."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("qwen3_5_moe_text", tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    fused: dict[str, torch.Tensor] = {k: v for k, v in stored.items() if ".experts." not in k}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            p: torch.stack([stored[f"{prefix}{e}.{p}_proj.weight"] for e in range(6)]) for p in ("gate", "up", "down")
        }
        fused[f"{prefix}gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), 1)
        fused[f"{prefix}down_proj"] = parts["down"]
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_text((model / "config.json").read_text())
    save_file({k: v.contiguous() for k, v in fused.items()}, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    opened, whole = Checkpoint.open(tmp_path / "fused"), Checkpoint.open(model)
    for name, values in stored.items():
        assert torch.equal(opened.load(name), values) and opened.entries[name].shape == whole.entries[name].shape, name


def test_plans_of_real_sizes(tmp_path: Path) -> None:
    """Qwen3-Next-80B-A3B and DeepSeek-V3 by their published config.json: parameters as their names say."""
    for config, billions in ((NEXT_80B, 79.7), (DEEPSEEK_V3, 671.0)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        sets = (*SMALL, "calibration.length=64")
        from compress.recipe import load_recipe

        plan = make_plan(load_recipe("qwen-moe-2bit", sets, model=str(tmp_path), output=str(tmp_path / "out")))
        assert plan.parameters / 1e9 == pytest.approx(billions, rel=0.01)
        assert 2.0 < plan.bits_per_weight < 3.5
        assert np.isfinite(plan.peak_memory_bytes)


NEXT_80B = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "intermediate_size": 5120, "num_experts": 512,
    "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_theta": 1e7, "norm_topk_prob": True,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "intermediate_size": 18432, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8,
    "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0,
        "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip
