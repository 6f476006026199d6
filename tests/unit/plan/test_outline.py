"""A plan counts by kinds of block: against the same counted tensor by tensor."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.codecs.names import ggml_fallback
from compress.containers import CONTAINERS
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.recipe.rules import match
from compress.report.plan_table import plan_table
from tests.unit.plan.test_plan import LARGE, SMALL, folder

LATENT = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "intermediate_size": 1024, "first_k_dense_replace": 3,
    "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 256, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "vocab_size": 1000,
    "max_position_embeddings": 2048, "rope_interleave": True, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
GATED_DELTA = {
    **SMALL, "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "num_hidden_layers": 12,
    "num_experts": 12, "shared_expert_intermediate_size": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64, "linear_num_key_heads": 2, "linear_value_head_dim": 64, "linear_num_value_heads": 4,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
MODELS = {"grouped": {**SMALL, "num_hidden_layers": 12, "num_experts": 12}, "latent": LATENT, "delta": GATED_DELTA}

BY_LAYER = """
        - {targets: [attention], layers: [first 2], codec: q8_0}
        - {targets: [routed_experts.down], layers: ["5", "7-10"], codec: q6_k}
        - {targets: [routed_experts, shared_experts, mlp, attention], codec: q4_k}
"""
BY_NAME = """
        - {targets: ['re:.*layers\\.1\\d?\\.mlp\\.experts\\.3\\.down_proj'], codec: q6_k}
        - {targets: ['re:.*layers\\.(4|11)\\..*experts', attention], codec: q8_0}
        - {targets: [routed_experts], codec: q4_k}
"""


def planned(where: Path, config: dict[str, Any], rules: str, *containers: str) -> Plan:
    model = folder(where / "m", config)
    (where / "r.yaml").write_text(
        f"name: r\nmodel: {model}\nsteps:\n  - quantize:\n      solver: rtn\n      rules:{rules}"
        f"export: [{', '.join(f'{{container: {name}}}' for name in containers)}]\nscore: false\n"
    )
    return make_plan(load_recipe(where / "r.yaml"))


def stacked_names(plan: Plan) -> dict[str, int]:
    """GGUF's tensors, the experts of a layer as one, and the dimensions of a part."""
    return {piece.name: len(piece.shape or t.spec.shape) for t in plan.tensors for piece in t.spec.pieces}


@pytest.mark.parametrize("rules", [BY_LAYER, BY_NAME], ids=["by layer", "by name"])
@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_of_the_listing(tmp_path: Path, model: str, rules: str) -> None:
    containers = ("safetensors", "compress") if rules is BY_NAME else ("safetensors", "gguf")
    plan = planned(tmp_path, MODELS[model], rules, *containers)
    assert len(plan.outline.kinds) < plan.spec.layers == 12
    assert [t.spec for t in plan.tensors] == list(plan.spec.tensors())
    assert [t for block in plan.blocks for t in block] == [t for t in plan.tensors if t.spec.layer is not None]
    assert sum(count for _, count in plan.counted) == len(plan.tensors)
    assert plan.parameters == plan.original_parameters == sum(t.parameters for t in plan.spec.tensors())
    assert plan.bytes == sum(t.bytes for t in plan.tensors)
    for name in containers:
        container, size = CONTAINERS[name], plan.file_bytes[name]
        entries = sum(container.entry_bytes(t) for t in plan.tensors)
        assert size == sum(container.tensor_bytes(t, "bf16") for t in plan.tensors) + entries
        if name == "gguf":
            assert entries == sum(len(n) + 56 + 8 * dims for n, dims in stacked_names(plan).items())


@pytest.mark.parametrize("rules", [BY_LAYER, BY_NAME], ids=["by layer", "by name"])
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_has_the_codec_of_its_rule(tmp_path: Path, model: str, rules: str) -> None:
    plan = planned(tmp_path, MODELS[model], rules, "compress")
    step = plan.recipe.step("quantize")
    for t in plan.tensors:
        rule = match(step.rules, t.spec, plan.spec.layers)
        codec = "bf16" if rule is None else ggml_fallback(rule.codec, t.spec.shape[-1]) or rule.codec
        assert t.codec == codec, t.name


def test_a_survey_changes_single_tensors(tmp_path: Path) -> None:
    plan = planned(tmp_path, MODELS["grouped"], BY_LAYER, "safetensors")
    name = "model.layers.11.mlp.experts.3.up_proj.weight"
    settled = plan.outline.changed(lambda t: replace(t, bytes=7) if t.name == name else t)
    expected = [7 if t.name == name else t.bytes for t in plan.tensors]
    assert [t.bytes for t in settled.tensors] == expected
    assert sum(count * t.bytes for t, count in settled.counted) == sum(expected) < plan.bytes


@pytest.mark.parametrize("recipe", ["structured-25", "qwen-moe-2bit", "compot-20"])
def test_a_table_lists_no_tensors(tmp_path: Path, recipe: str) -> None:
    """Of a model with 37,000 of them; what is cached says what was asked for."""
    plan = make_plan(load_recipe(recipe, model=str(folder(tmp_path / "m", LARGE))))
    Console(file=io.StringIO()).print(plan_table(plan))
    assert not {"tensors", "blocks"} & set(vars(plan.outline))
    assert "_tensors" not in {**vars(plan.spec), **vars(plan.original)}
