"""Mamba-2: the scan against its recurrence, layers against transformers over several of its chunks and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import ConfigError, UnsupportedModel
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.forward.mamba2 import CHUNK, scan
from tests.contract.blocks import SMALL, gap, logits, randn
from tests.tiny import tiny_config, tiny_model


def recurrence(values: Tensor, decays: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Token by token, as the definition says."""
    each = values.shape[2] // keys.shape[2]
    state, out = torch.zeros(*values.shape[:1], *values.shape[2:], keys.shape[-1], dtype=values.dtype), []
    for t in range(values.shape[1]):
        key, query = (part[:, t].repeat_interleave(each, 1)[:, :, None] for part in (keys, queries))
        state = state * decays[:, t].exp()[..., None, None] + values[:, t, :, :, None] * key
        out.append((state * query).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_the_scan_is_its_recurrence(length: int) -> None:
    values, decays = randn(2, length, 6, 5), -randn(2, length, 6, seed=1).abs()
    keys, queries = randn(2, length, 3, 4, seed=2), randn(2, length, 3, 4, seed=3)
    assert gap(scan(values, decays, keys, queries), recurrence(values, decays, keys, queries)) < 1e-12


def test_nothing_overflows_where_a_state_is_forgotten_at_once() -> None:
    values, decays = randn(1, 2 * CHUNK, 2, 3).float(), torch.full((1, 2 * CHUNK, 2), -300.0)
    keys, queries = randn(1, 2 * CHUNK, 1, 4).float(), randn(1, 2 * CHUNK, 1, 4, seed=1).float()
    expected = recurrence(values, decays, keys, queries)
    assert torch.isfinite(expected).all() and gap(scan(values, decays, keys, queries), expected) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 32, "use_bias": True, "time_step_min": 0.3},
        {"use_conv_bias": False, "n_groups": 1, "conv_kernel": 3},
        {"layers_block_type": ["mlp", "linear_attention", "full_attention"], "mlp_bias": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_long_texts_are_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("nemotron_h", tmp_path, tokenizer=False, **SMALL, **options)
    spec, weights = load_spec(tiny_config("nemotron_h", **SMALL, **options)), load_file(folder / "model.safetensors")
    ids = torch.randint(0, SMALL["vocab_size"], (1, 3 * CHUNK + 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        assert (logits(spec, weights, ids) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        weights["backbone.layers.0.norm.weight"] *= -1  # the first tokens matter at the end
        assert (logits(spec, weights, ids) - theirs)[:, -1].abs().max() > 0.1


def test_older_words_for_the_layers() -> None:
    config = tiny_config("nemotron_h")
    older = {k: v for k, v in config.items() if k != "layers_block_type"}
    for said in (
        {"hybrid_override_pattern": "M*EME", "num_hidden_layers": 5},
        {"layers_block_type": ["mamba", "attention", "moe", "mamba", "moe"]},
    ):
        spec = load_spec(older | said)
        assert spec.layers == 5 and spec.tensors() == load_spec(config).tensors()
    with pytest.raises(ConfigError, match="layers_block_type"):
        load_spec(older)
    with pytest.raises(ConfigError, match=r"layers_block_type\[1\]"):
        load_spec(older | {"hybrid_override_pattern": "MX"})


@pytest.mark.parametrize(("key", "value"), [("moe_latent_size", 32), ("mlp_bias", True)])
def test_other_experts_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        load_spec({**tiny_config("nemotron_h"), key: value})


NANO = {
    "model_type": "nemotron_h", "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "mamba_num_heads": 64, "n_groups": 8,
    "mamba_head_dim": 64, "ssm_state_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "vocab_size": 131072,
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "intermediate_size": 1856,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
GRANITE_SMALL = {
    "model_type": "granitemoehybrid", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 768, "shared_intermediate_size": 1536, "num_local_experts": 72,
    "num_experts_per_tok": 10, "vocab_size": 100352, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    "position_embedding_type": "nope", "tie_word_embeddings": True, "time_step_limit": [0.0, float("inf")],
}  # fmt: skip
LFM2_8B = {
    "model_type": "lfm2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4,
    "vocab_size": 65536, "tie_embedding": True,
    "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions", "arch"),
    [(NANO, 31.6, "nemotron_h_moe"), (GRANITE_SMALL, 32.2, "granitehybrid"), (LFM2_8B, 8.34, "lfm2moe")],
)
def test_published_models_have_as_many_parameters_as_their_cards_say(
    config: dict[str, Any], billions: float, arch: str
) -> None:
    """Nemotron 3 Nano 30B-A3B, Granite 4.0 H Small and LFM2-8B-A1B, by what matters of their config.json."""
    from compress.containers.gguf import check_representable

    spec = load_spec(config)
    assert spec.parameters / 1e9 == pytest.approx(billions, rel=0.003)
    assert spec.gguf_arch == arch and check_representable(spec) == []


@pytest.mark.parametrize(
    ("family", "experts", "parts"),
    [
        ("nemotron_h", "backbone.layers.{}.mixer.experts.", {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}),
        ("lfm2_moe", "model.layers.{}.feed_forward.experts.", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    ],
)
def test_stacked_experts_are_read(family: str, experts: str, parts: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    """Checkpoints that hold all experts of a layer in one tensor, as transformers has them in memory."""
    model = tiny_model(family, tmp_path / "model", tokenizer=False, **SMALL)
    stored, spec = load_file(model / "model.safetensors"), load_spec(tiny_config(family, **SMALL))
    stacked = {name: w for name, w in stored.items() if ".experts." not in name}
    for layer in sorted(spec.sparse_layers):
        prefix = experts.format(layer)
        for whole, leaves in parts.items():
            each = [[stored[f"{prefix}{e}.{leaf}.weight"] for leaf in leaves] for e in range(spec.experts)]
            stacked[prefix + whole] = torch.stack([torch.cat(matrices) for matrices in each])
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked" / "config.json").write_text((model / "config.json").read_text())
    save_file(stacked, tmp_path / "stacked" / "model.safetensors", {"format": "pt"})
    opened = Checkpoint.open(tmp_path / "stacked")
    assert all(torch.equal(opened.load(name), values) for name, values in stored.items())
