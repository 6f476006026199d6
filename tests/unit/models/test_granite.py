"""Granite 4 as its config.json says it, in older words and with what transformers writes for infinity; dense ones, too."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ConfigError
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.layers.mamba2 import Mamba2
from tests.contract.blocks import SMALL, logits
from tests.tiny import tiny_config, tiny_model

FAMILY = "granitemoehybrid"
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}


def test_older_words_for_the_layers() -> None:
    config = tiny_config(FAMILY)
    older = {**config, "layer_types": ["mamba", "attention", "mamba"]}
    assert load_spec(older).tensors() == load_spec(config).tensors()
    other = {**{k: v for k, v in config.items() if k != "layer_types"}, "layers_block_type": ["attention"] * 3}
    assert not any(isinstance(s, Mamba2) for block in load_spec(other).blocks for s in block)
    assert all(isinstance(block[0], Mamba2) for block in load_spec({**config, "layer_types": None}).blocks)


@pytest.mark.parametrize("given", [[0.0, inf], [0.0, {"__float__": "Infinity"}], None])
def test_no_limit_of_time_steps_has_three_spellings(given: Any) -> None:
    mamba = load_spec({**tiny_config(FAMILY), "time_step_limit": given}).blocks[0][0]
    assert isinstance(mamba, Mamba2) and mamba.limits == (0.0, inf)


def test_heads_must_fill_the_channels() -> None:
    config = tiny_config(FAMILY)
    assert load_spec({**config, "mamba_d_head": "auto"}).tensors() == load_spec(config).tensors()
    with pytest.raises(ConfigError, match="mamba_n_heads: 8 heads of mamba_d_head"):
        load_spec({**config, "mamba_d_head": 15})


@pytest.mark.parametrize(
    "options",
    [
        {**DENSE, "attention_bias": True, "position_embedding_type": "rope"},
        {"mamba_n_groups": 2, "mamba_proj_bias": True, "time_step_limit": [0.2, 1.0], "mamba_chunk_size": 16},
        {"mamba_conv_bias": False, "mamba_expand": 4, "mamba_n_heads": 16},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_are_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(tiny_model(FAMILY, tmp_path, tokenizer=False, **SMALL, **options))
    spec = load_spec(checkpoint.config)
    weights = {t.name: checkpoint.load(t.name) for t in spec.tensors()}
    ids = torch.randint(0, SMALL["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(ids).logits
        assert (logits(spec, weights, ids) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
