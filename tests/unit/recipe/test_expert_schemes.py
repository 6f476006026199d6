"""`EXPERTS_*` through make_plan: any number of experts, every family that has them, nothing but a config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compress.codecs.names import codec_info, row_bytes
from compress.errors import PlanError
from compress.models import load_spec
from compress.models.layers.moe import MoE
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.recipe.schemes import EXPERT_SCHEMES
from tests.tiny import FAMILIES, FOR_LLAMA_CPP, tiny_config

LAYERS = 5
COMMON = {
    "dtype": "float16",
    "hidden_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts_per_tok": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
DELTA = {
    "head_dim": 64, "shared_expert_intermediate_size": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
MIXTURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "mixtral": lambda count: {"num_local_experts": count, "intermediate_size": 256, "sliding_window": None},
    "qwen2_moe": lambda count: {"num_experts": count, "shared_expert_intermediate_size": 512, "norm_topk_prob": False},
    "qwen3_moe": lambda count: {"num_experts": count, "head_dim": 64, "norm_topk_prob": True},
    "qwen3_next": lambda count: {"num_experts": count, **DELTA},
    "qwen3_5_moe_text": lambda count: {"num_experts": count, **DELTA},
    "deepseek_v2": lambda count: {"n_routed_experts": count, **LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    "gemma4_text": lambda count: {
        "num_experts": count,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "head_dim": 64,
        "global_head_dim": 128,
    },
    "deepseek_v3": lambda count: {"n_routed_experts": count, **LATENT, "q_lora_rank": 256},
}
SHARED_GATES = {"qwen2_moe", "qwen3_next", "qwen3_5_moe_text"}
"""Families whose shared expert has a gate, which is a router, too."""
# bytes of a block of 256 columns (ggml-common.h): gate and up, down, and both in the first and last layers
BYTES = {
    "EXPERTS_4BIT": (136, 144, 136, 144),
    "EXPERTS_3BIT": (98, 110, 98, 110),
    "EXPERTS_2BIT": (66, 84, 66, 84),
    "EXPERTS_1BIT": (56, 66, 66, 84),
}


def plan_of(folder: Path, scheme: str, config: dict[str, Any]) -> Plan:
    model, recipe = folder / "model", folder / "recipe.yaml"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({**COMMON, **config}))
    recipe.write_text(
        f"model: {model}\nsteps: [{{quantize: {{scheme: {scheme}}}}}]\nexport: [{{container: gguf}}]\nscore: false\n"
    )
    return make_plan(load_recipe(recipe))


@cache
def mixtures() -> dict[str, dict[str, Any]]:
    """The tiny configurations of all families with experts, such as llama.cpp takes."""
    configs = {name: tiny_config(name, **FOR_LLAMA_CPP.get(name, {})) for name in FAMILIES}
    return {n: c for n, c in configs.items() if any(isinstance(s, MoE) for block in load_spec(c).blocks for s in block)}


def test_these_are_all_schemes_and_families_with_experts() -> None:
    assert set(BYTES) == set(EXPERT_SCHEMES) and set(MIXTURES) < set(mixtures())


@pytest.mark.parametrize("family", mixtures())
def test_experts_alone_are_below_eight_bits(family: str, tmp_path: Path) -> None:
    config, spec = mixtures()[family], load_spec(mixtures()[family])
    plan = plan_of(tmp_path, "EXPERTS_2BIT", {**config, "max_position_embeddings": 2048})
    experts = {(t.spec.layer, t.spec.expert) for t in plan.tensors if t.spec.role.startswith("routed_experts.")}
    mixed = {layer for layer, block in enumerate(spec.blocks) if any(isinstance(s, MoE) for s in block)}
    assert experts == {(layer, e) for layer in mixed for e in range(spec.experts)}
    for t in plan.tensors:
        if len(t.spec.shape) < 2 or t.spec.role in ("small", "router"):
            assert codec_info(t.codec).is_float, t.name
        elif t.spec.role.startswith("routed_experts.") and t.spec.shape[-1] % 32 == 0:
            assert 8 * row_bytes(t.codec, t.spec.shape[-1]) < 6 * t.spec.shape[-1], t.name
        else:
            assert t.codec in ("q8_0", "f16", "bf16", "f32"), t.name


@pytest.mark.parametrize("scheme", EXPERT_SCHEMES)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_covered_and_legal(family: str, scheme: str, tmp_path: Path) -> None:
    for count in (8, 60, 64, 128, 256):
        plan = plan_of(tmp_path, scheme, {"model_type": family, **MIXTURES[family](count)})
        turned = {"attention.kv_b"} if family.startswith("deepseek") else set()  # GGUF wants keys' rows as columns
        assert {t.spec.role for t in plan.fallbacks} == turned and len(plan.exchanges) == len(turned)
        inner_wide, inner_down, edge_wide, edge_down = BYTES[scheme]
        seen = set()
        for tensor in plan.tensors:
            role, layer = tensor.spec.role, tensor.spec.layer
            if role.startswith("routed_experts."):
                edge = layer in (0, LAYERS - 1)
                down, wide = (edge_down, edge_wide) if edge else (inner_down, inner_wide)
                assert row_bytes(tensor.codec, 256) == (down if role.endswith("down") else wide)
                seen.add((layer, tensor.spec.expert, role.split(".")[1]))
            elif role in ("router", "norms", "biases", "small"):
                assert tensor.codec == "f32" and tensor.solver is None
            else:
                assert tensor.codec == ("f16" if role in turned else "q8_0")
        assert seen == {(n, e, p) for n in range(LAYERS) for e in range(count) for p in ("gate", "up", "down")}
        routers = [t.spec.shape[0] for t in plan.tensors if t.spec.role == "router"]
        assert routers.count(count) == LAYERS
        assert len(routers) == LAYERS * (2 if family in SHARED_GATES else 1)


def test_odd_rows_fall_back(tmp_path: Path) -> None:
    """Rows of 352 columns fall back as in llama.cpp, and the plan says so."""
    config = {"model_type": "qwen2_moe", **MIXTURES["qwen2_moe"](60), "moe_intermediate_size": 352}
    plan = plan_of(tmp_path, "EXPERTS_2BIT", config)
    assert {t.codec for t in plan.tensors if t.spec.role == "routed_experts.down"} == {"q4_0"}
    assert {t.codec for t in plan.tensors if t.spec.role == "routed_experts.up"} == {"iq2_xxs"}
    assert any(exchange.wanted == "q2_k" and exchange.used == "q4_0" for exchange in plan.exchanges)


@pytest.mark.parametrize("scheme", EXPERT_SCHEMES)
def test_a_dense_model_is_told_so(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"scheme {scheme} is about routed experts and llama has none"):
        plan_of(tmp_path, scheme, {"model_type": "llama"})
