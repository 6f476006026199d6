"""Names of the checkpoint against those of the plan: what config.json does not imply is refused or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.models import load_spec
from compress.models.checkpoint import SINGLE, Checkpoint
from compress.models.surplus import Surplus, surplus
from tests.tiny import tiny_model, with_tensors

SMALL = {"vocab_size": 300, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "tokenizer": False}
ONES = torch.ones(48)


def _found(folder: Path, extra: dict[str, torch.Tensor], **config: Any) -> tuple[list[str], list[str]]:
    weights = load_file(folder / SINGLE)
    save_file({**weights, **extra}, folder / SINGLE, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    checkpoint = Checkpoint.open(folder)
    found = surplus(load_spec(checkpoint.config), checkpoint)
    assert not found.beside
    return found.problems, found.lines


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_a_stock_checkpoint_holds_nothing_unasked(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path, tokenizer=False)
    checkpoint = Checkpoint.open(folder)
    assert surplus(load_spec(checkpoint.config), checkpoint) == Surplus()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.norm.bias",
        "lm_head.bias",
        "model.embed_positions.weight",
        "model.layers.0.mlp.gate_proj.weight_scale_inv",
    ],
)
def test_what_changes_the_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    problems, left_out = _found(tiny_model("llama", tmp_path, **SMALL), {name: ONES})
    assert len(problems) == 1 and name in problems[0] and not left_out


def test_biases_of_zeros_add_nothing(tmp_path: Path) -> None:
    """AutoGPTQ wrote them for linears that have none."""
    name = "model.layers.0.self_attn.q_proj.bias"
    problems, left_out = _found(tiny_model("llama", tmp_path, **SMALL), {name: torch.zeros(48)})
    assert not problems and len(left_out) == 1 and name in left_out[0]


@pytest.mark.parametrize("layer", [2, 11])
def test_layers_beyond_the_config_are_refused(layer: int, tmp_path: Path) -> None:
    problems, _ = _found(
        tiny_model("llama", tmp_path, **SMALL), {f"model.layers.{layer}.self_attn.q_proj.weight": ONES}
    )
    assert len(problems) == 1 and f"layers up to {layer}" in problems[0] and "num_hidden_layers 2" in problems[0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("score.weight", {}),
        ("v_head.summary.weight", {}),
        ("mtp.blk.2.attn_q.weight", {}),
        ("visual.blocks.0.attn.qkv.weight", {}),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
    ],
)
def test_what_stands_beside_the_model_is_named(name: str, config: dict[str, int], tmp_path: Path) -> None:
    problems, left_out = _found(tiny_model("llama", tmp_path, **SMALL), {name: ONES}, **config)
    assert not problems and len(left_out) == 1 and name in left_out[0]


@pytest.mark.parametrize(
    ("name", "shape", "role", "config"),
    [
        ("mtp.layers.0.mlp.gate_proj.weight", (8, 48), "mtp", {}),
        ("mtp.layers.0.mlp.gate.weight", (4, 48), "router", {}),
        ("mtp.layers.0.mlp.shared_expert_gate.weight", (1, 48), "router", {}),
        ("mtp.layers.0.mlp.experts.gate_up_proj", (2, 8, 48), "mtp", {}),
        ("mtp.pre_fc_norm_hidden.weight", (48,), "norms", {}),
        ("model.layers.2.eh_proj.weight", (48, 96), "mtp", {"num_nextn_predict_layers": 1}),
        ("model.layers.2.embed_tokens.weight", (300, 48), "embeddings", {"num_nextn_predict_layers": 1}),
        ("model.layers.2.shared_head.head.weight", (300, 48), "lm_head", {"num_nextn_predict_layers": 1}),
        ("model.layers.2.mlp.gate.e_score_correction_bias", (4,), "biases", {"num_nextn_predict_layers": 1}),
    ],
)
def test_draft_layers_go_along(
    name: str, shape: tuple[int, ...], role: str, config: dict[str, int], tmp_path: Path
) -> None:
    folder = with_tensors(tiny_model("llama", tmp_path, **SMALL), {name: torch.ones(shape)})
    checkpoint = Checkpoint.open(folder)
    found = surplus(load_spec({**checkpoint.config, **config}), checkpoint)
    assert not found.problems and not found.lines
    assert [(t.name, t.shape, t.role, t.beside) for t in found.beside] == [(name, shape, role, "MTP")]


def test_tied_embeddings_and_a_head(tmp_path: Path) -> None:
    """The same bytes twice are the same model; another head is not, nor one of another type."""
    folder = tiny_model("llama", tmp_path, tie_word_embeddings=True, **SMALL)
    table = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    assert _found(folder, {"lm_head.weight": table.clone()}) == ([], [])
    other = table.clone()
    other[-1, -1] += 1e-3
    for head in (other, table.half()):
        problems, _ = _found(folder, {"lm_head.weight": head})
        assert len(problems) == 1 and "tie_word_embeddings" in problems[0] and "lm_head.weight" in problems[0]


def test_many_tensors_of_a_kind_are_one_line(tmp_path: Path) -> None:
    extra = {f"model.layers.{n}.self_attn.{p}_proj.bias": ONES.clone() for n in range(2) for p in "qkvo"}
    problems, _ = _found(tiny_model("llama", tmp_path, **SMALL), extra)
    assert len(problems) == 1 and "8 tensors in all" in problems[0] and problems[0].count("_proj.bias") == 3
