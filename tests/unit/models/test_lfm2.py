"""LFM2's config.json says some things twice and some in other words: transformers reads it, and so do we."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import ConfigError
from compress.models import load_spec
from tests.contract.blocks import SMALL, logits
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"block_ff_dim": 150},
        {"block_auto_adjust_ff_dim": False},
        {"tie_embedding": True},
        {"tie_embedding": False, "tie_word_embeddings": True},
        {"layer_types": None, "full_attn_idxs": [0, 2]},
        {"layer_types": None},
    ],
    ids=lambda given: " ".join(given) or "usual",
)
def test_tensors_are_those_that_transformers_makes(given: dict[str, Any]) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = {**tiny_config("lfm2"), **given}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = Lfm2ForCausalLM(Lfm2Config(**fields))
    wanted = {name: tuple(w.shape) for name, w in model.named_parameters()}
    assert {t.name: t.shape for t in load_spec(config).tensors()} == wanted


def test_convolutions_with_biases_are_computed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("lfm2", tmp_path, tokenizer=False, conv_bias=True, conv_L_cache=4, **SMALL)
    spec, weights = (
        load_spec(tiny_config("lfm2", conv_bias=True, conv_L_cache=4, **SMALL)),
        load_file(folder / "model.safetensors"),
    )
    ids = torch.arange(40)[None] * 7 % SMALL["vocab_size"]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        assert (logits(spec, weights, ids) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert {"model.layers.0.conv.conv.bias", "model.layers.0.conv.in_proj.bias"} <= weights.keys()


def test_untied_is_untied_for_transformers_too() -> None:
    from transformers import Lfm2Config

    spec = load_spec({**tiny_config("lfm2"), "tie_embedding": True})
    assert spec.tied and not load_spec(spec.untied().config).tied
    fields = {key: value for key, value in spec.untied().config.items() if key != "model_type"}
    assert Lfm2Config(**fields).tie_word_embeddings is False


def test_mixtures_must_say_which_layers_are_convolutions() -> None:
    with pytest.raises(ConfigError, match="layer_types: missing"):
        load_spec({**tiny_config("lfm2_moe"), "layer_types": None})
    with pytest.raises(ConfigError, match="only 1 of 4 layers are dense"):
        load_spec({**tiny_config("lfm2_moe"), "num_experts": 0})
