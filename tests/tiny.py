"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "bos_token_id": 4093,
    "eos_token_id": 4093,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 32}
_DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
_LATENT = {
    "num_hidden_layers": 3, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
}  # fmt: skip
_CONV = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "norm_eps": 1e-5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_next": (
        "Qwen3Next",
        {**_DELTA, **_EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {**_DELTA, **_EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 48}),
    "qwen3_5_text": ("Qwen3_5", _DELTA),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, **_EXPERTS, "q_lora_rank": None, "routed_scaling_factor": 1.5, "topk_method": "greedy"},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_LATENT, **_EXPERTS, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
    "lfm2": ("Lfm2", {**_CONV, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 8}),
    "lfm2_moe": ("Lfm2Moe", {**_CONV, **_EXPERTS, "num_experts": 6, "num_dense_layers": 1, "norm_topk_prob": True}),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32, "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_heads": 8,
            "mamba_d_state": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48,
            "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_EXPERTS, "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "moe"],
            "head_dim": 32, "mamba_num_heads": 6, "mamba_head_dim": 16, "ssm_state_size": 12, "n_groups": 2, "n_routed_experts": 8,
            "n_group": 2, "topk_group": 1, "moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 2.5,
            "layer_norm_epsilon": 1e-5, "norm_topk_prob": True,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **_LATENT, **_EXPERTS, "q_lora_rank": 24, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
            "norm_topk_prob": True,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **_EXPERTS, "num_hidden_layers": 3, "head_dim": 32, "attention_bias": True, "use_qk_norm": True,
            "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        },
    ),
    "dots1": (
        "Dots1",
        {
            **_EXPERTS, "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 24, "sliding_window": None,
            "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
            "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": ("Olmo2", {}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0, "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma4_text": (
        "Gemma4",
        {
            "head_dim": 24, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 32,
            "final_logit_softcapping": 5.0, "pad_token_id": 0,
        },
    ),
    "olmo3": ("Olmo3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    ),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "phi3": (
        "Phi3",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "seed_oss": ("SeedOss", {"head_dim": 32}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 32}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 3, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        },
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 32}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"head_dim": 32, "num_experts": 6, "moe_topk": 3, "intermediate_size": 32}),
    "llama4_text": (
        "Llama4",
        {
            "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size": 32,
            "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "attention_chunk_size": 11, "floor_scale": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "hy_v3": (
        "HYV3",
        {**_EXPERTS, "num_hidden_layers": 3, "head_dim": 32, "num_experts": 6, "num_shared_experts": 2},
    ),
    "afmoe": (
        "Afmoe",
        {
            **_EXPERTS, "num_hidden_layers": 4, "head_dim": 32, "num_experts": 6, "num_shared_experts": 2, "num_dense_layers": 1,
            "route_scale": 2.5, "sliding_window": 11, "mup_enabled": True,
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            **_EXPERTS, "num_hidden_layers": 3, "n_routed_experts": 6, "head_dim": 48, "v_head_dim": 32,
            "num_key_value_heads": 1, "sliding_window": 11, "layer_types": ["full_attention"] + 2 * ["sliding_attention"],
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 32, "sliding_window": 11,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 150000.0,
            },
        },
    ),
    "deepseek_v32": (
        "DeepseekV32",
        {
            **_LATENT, **_EXPERTS, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "index_topk": 64, "index_head_dim": 64,
            "index_n_heads": 3,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        {**_LATENT, **_EXPERTS, "q_lora_rank": 24, "index_topk": 64, "index_head_dim": 64, "index_n_heads": 3},
    ),
    "exaone4": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "solar_open": (
        "SolarOpen", {**_EXPERTS, "head_dim": 32, "n_routed_experts": 6, "n_shared_experts": 1, "norm_topk_prob": True}
    ),
}  # fmt: skip


FOR_LLAMA_CPP: dict[str, dict[str, Any]] = {"llama4_text": {"attention_chunk_size": 8192, "floor_scale": 8192}}
"""What llama.cpp's architectures have fixed, where the tiny models have something shorter."""
EVERY_RECIPE = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral")
OTHER_MIXERS = tuple(family for family in FAMILIES if family not in EVERY_RECIPE)
"""Families that take two recipes: other token mixers, and what differs from those in a table alone. Every recipe on each would
take too long."""

_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
WRAPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", "qwen3_5_text", {"vision_config": _VISION}),
    "qwen3_5_moe": ("Qwen3_5Moe", "qwen3_5_moe_text", {"vision_config": _VISION}),
    "gemma3": ("Gemma3", "gemma3_text", {"vision_config": _TOWER, "mm_tokens_per_image": 4}),
    "gemma4": (
        "Gemma4",
        "gemma4_text",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "global_head_dim": 16,
                "patch_size": 4,
                "position_embedding_size": 16,
                "pooling_kernel_size": 2,
            },
            "audio_config": None,
        },
    ),
    "mistral3": ("Mistral3", "mistral", {"vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 16}}),
    "llama4": (
        "Llama4",
        "llama4_text",
        {"vision_config": {**_TOWER, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
    ),
}
"""Multimodal models: of transformers' class, around which family, with which keys of config.json."""


def demo_model() -> Path:
    """The trained demo model that ships in models/ (its tokenizer is the tiny models' tokenizer)."""
    return Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3-moe"


def _config(family: str, overrides: dict[str, Any]) -> Any:
    import transformers

    prefix, defaults = FAMILIES[family]
    kind = f"{prefix}TextConfig" if hasattr(transformers, f"{prefix}TextConfig") else f"{prefix}Config"
    return getattr(transformers, kind)(**{**_COMMON, **defaults, **overrides})


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The config.json that transformers writes for a tiny model."""
    return json.loads(json.dumps(_config(family, overrides).to_dict()))


def tiny_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = True,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Save a random model of `family` to `folder` (config, safetensors, the demo tokenizer) and return `folder`.

    `overrides` are config keys: hidden_size=72 (no multiple of 32 or 256), tie_word_embeddings=True,
    num_key_value_heads=4, attention_bias=True, ... Weights are scaled up so that logits spread like a trained
    model's, biases and norms are random too.
    """
    config = _config(family, overrides)
    return _saved(f"{FAMILIES[family][0]}ForCausalLM", config, folder, seed, dtype, tokenizer, max_shard_size)


def tiny_wrapped(wrapper: str, folder: Path, *, dtype: str = "float32", **overrides: Any) -> Path:
    """The same of a multimodal model. overrides: keys of the language model's config."""
    import transformers

    prefix, family, around = WRAPPED[wrapper]
    text = {**_COMMON, **FAMILIES[family][1], **overrides}
    around = {**around, "vision_config": {**around["vision_config"], "out_hidden_size": text["hidden_size"]}}
    config = getattr(transformers, f"{prefix}Config")(text_config={**text, "model_type": family}, **around)
    return _saved(f"{prefix}ForConditionalGeneration", config, folder, 0, dtype, True, "50GB")


def with_tensors(folder: Path, extra: dict[str, Any]) -> Path:
    """A model folder of one file with more tensors in it."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _saved(kind: str, config: Any, folder: Path, seed: int, dtype: str, tokenizer: bool, max_shard_size: str) -> Path:
    import torch
    import transformers

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config)
    tied = config.get_text_config().tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator).log())
            elif "norm" in name and parameter.abs().max() == 0:  # of 1 + w
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter.shape[-1]
                scale = 1.0 if "embed" in name and not tied else 2.0 / fan_in**0.5  # tied: the head
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    if dtype != "float32":
        model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(demo_model() / name, Path(folder) / name)
    return Path(folder)
