"""Published models by their config.json, as their makers wrote it: keys that transformers' own writer would have changed are
read, and there are as many parameters as their names and cards say, draft layers and vision towers apart."""

from __future__ import annotations

from typing import Any

import pytest

from compress.models import load_spec
from compress.models.layers.attention import Attention

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "GLM-4.5-Air": (106.9, {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "head_dim": 128,
        "hidden_size": 4096, "partial_rotary_factor": 0.5, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_attention_heads": 96, "num_key_value_heads": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "num_hidden_layers": 46, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "use_qk_norm": False, "vocab_size": 151552, "norm_topk_prob": True,
        "eos_token_id": [151329, 151336, 151338], "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }),
    "Phi-4": (14.66, {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 17920,
        "num_attention_heads": 40, "num_key_value_heads": 10, "num_hidden_layers": 40, "vocab_size": 100352,
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_scaling": None,
        "rope_theta": 250000, "sliding_window": None, "resid_pdrop": 0.0, "tie_word_embeddings": False,
    }),
    "Phi-4-mini": (3.84, {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
        "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 200064,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "long_factor": [1] * 48, "short_factor": [1.0] * 48}, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1,
    }),
    "Kimi-K2": (1026.4, {
        "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "x.DeepseekV3Config"},
        **LATENT, "q_lora_rank": 1536, "first_k_dense_replace": 1, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "vocab_size": 163840, "max_position_embeddings": 131072,
    }),
    "DeepSeek-V3.2": (671.9, {
        "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], **LATENT, "q_lora_rank": 1536,
        "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_key_value_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "vocab_size": 129280,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "max_position_embeddings": 163840,
    }),
    "MiniMax-M2": (228.7, {
        "model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 128, "hidden_size": 3072,
        "intermediate_size": 1536, "attn_type_list": [1] * 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_local_experts": 256, "num_mtp_modules": 3,
        "qk_norm_type": "per_layer", "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
        "max_position_embeddings": 196608, "tie_word_embeddings": False,
    }),
    "OLMoE-1B-7B": (6.92, {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "vocab_size": 50304,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }),
    "SmolLM3-3B": (3.08, {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_hidden_layers": 36, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "vocab_size": 128256,
        "rope_scaling": None, "rope_theta": 5000000.0, "max_position_embeddings": 65536, "use_sliding_window": False,
    }),
    "Seed-OSS-36B": (36.15, {
        "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_out_bias": False,
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 80, "num_key_value_heads": 8,
        "num_hidden_layers": 64, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "vocab_size": 155136,
        "max_position_embeddings": 524288, "tie_word_embeddings": False,
    }),
    "Hunyuan-A13B": (80.4, {
        "model_type": "hunyuan_v1_moe", "architectures": ["HunYuanMoEV1ForCausalLM"], "attention_head_dim": 128,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 3072, "moe_intermediate_size": [3072] * 32,
        "moe_topk": [8] * 32, "num_experts": 64, "num_shared_expert": [1] * 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "rope_theta": 10000.0, "use_qk_norm": True, "vocab_size": 128167,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }),
    "ERNIE-4.5-21B-A3B": (21.83, {
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 2560,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "moe_k": 6, "moe_num_experts": 64,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
        "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "num_attention_heads": 20,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "rope_theta": 500000.0, "use_bias": False, "vocab_size": 103424,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    }),
    "EXAONE-4.0-32B": (32.0, {
        "model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "hidden_size": 5120, "intermediate_size": 27392,
        "head_dim": 128, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16, "num_attention_heads": 40,
        "num_key_value_heads": 8, "num_hidden_layers": 64, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000, "vocab_size": 102400, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_as_many_parameters_as_their_cards_say(name: str) -> None:
    billions, config = PUBLISHED[name]
    assert load_spec(config).parameters / 1e9 == pytest.approx(billions, rel=0.003)


def test_what_published_configurations_say_otherwise() -> None:
    """Channels that turn by their number, lists of one number a layer, a theta that is stretched, layers without positions."""
    spec = {name: load_spec(config) for name, (_, config) in PUBLISHED.items()}

    def mixer(name: str, layer: int = 0) -> Attention:
        found = spec[name].blocks[layer][0]
        assert isinstance(found, Attention)
        return found

    assert [mixer(name).rope.dim for name in ("MiniMax-M2", "GLM-4.5-Air", "Phi-4", "Phi-4-mini")] == [64, 64, 128, 96]
    assert mixer("Phi-4-mini").rope.original == 4096 and mixer("Phi-4-mini").rope.type == "longrope"
    assert (
        mixer("Hunyuan-A13B").rope.theta == pytest.approx(10000 * 1000 ** (128 / 126))
        and not mixer("Hunyuan-A13B").rope.scaling
    )
    assert (spec["Hunyuan-A13B"].experts_per_token, spec["ERNIE-4.5-21B-A3B"].experts_per_token) == (8, 6)
    assert [mixer("SmolLM3-3B", layer).rope is None for layer in range(5)] == [False, False, False, True, False]
    assert [(mixer("EXAONE-4.0-32B", n).window, mixer("EXAONE-4.0-32B", n).rope is None) for n in (2, 3)] == [
        (4096, False),
        (None, True),
    ]
