"""Models of today by the keys of their published config.json: as many parameters as their names or papers say."""

from __future__ import annotations

from typing import Any

import pytest

from compress.containers.gguf import check_representable
from compress.models import load_spec

LLAMA_4: dict[str, Any] = {
    "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048,
    "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "no_rope_layers": [],
    "attn_temperature_tuning": 4, "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1,
    "max_position_embeddings": 10485760, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "use_qk_norm": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088, "num_local_experts": 32,
    "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128, "attention_bias": True, "swiglu_limit": 7.0,
    "initial_context_length": 4096, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
TRINITY: dict[str, Any] = {
    "model_type": "afmoe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 1024,
    "num_hidden_layers": 32, "num_dense_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 200192, "num_experts": 128, "num_experts_per_tok": 8, "num_shared_experts": 1, "route_scale": 2.826,
    "route_norm": True, "score_func": "sigmoid", "sliding_window": 2048, "global_attn_every_n_layers": 4, "mup_enabled": True,
    "rope_theta": 10000, "rope_scaling": None, "max_position_embeddings": 131072, "n_group": 1, "topk_group": 1,
}  # fmt: skip
HUNYUAN_3: dict[str, Any] = {
    "model_type": "hy_v3", "hidden_size": 4096, "intermediate_size": 13312, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 120832, "num_experts": 192,
    "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
}  # fmt: skip

MIMO_V2: dict[str, Any] = {
    "model_type": "mimo_v2_flash", "hidden_size": 4096, "intermediate_size": 16384, "moe_intermediate_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
    "vocab_size": 152576, "n_routed_experts": 256, "num_experts_per_tok": 8, "routed_scaling_factor": None, "n_group": 1,
    "topk_group": 1, "attention_value_scale": 0.707, "rope_theta": 5000000, "partial_rotary_factor": 0.334,
    "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (GPT_OSS, 20.9),
        ({**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}, 116.8),
        (LLAMA_4, 107.8),
        ({**LLAMA_4, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}, 400.7),
        (TRINITY, 26.1),
        (HUNYUAN_3, 295.0),
        (MIMO_V2, 308.8),
    ],
    ids=["gpt-oss-20b", "gpt-oss-120b", "scout", "maverick", "trinity-mini", "hunyuan-3", "mimo-v2-flash"],
)
def test_parameters(config: dict[str, Any], billions: float) -> None:
    spec = load_spec(config)
    assert spec.parameters / 1e9 == pytest.approx(billions, abs=0.06) and check_representable(spec) == []
