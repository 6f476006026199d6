"""Mamba-2: the scan against its recurrence, layers against transformers over several of its chunks and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import ConfigError, UnsupportedModel
from compress.models import load_spec
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
