"""Folders that other programs wrote in layouts of a format we name, but do not read: a line, never wrong numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.containers import CONTAINERS
from compress.errors import CheckpointError, CompressError
from compress.report.progress import Reporter
from compress.run.score import Settings, score_targets
from tests.integration.containers import spec_of
from tests.tiny import demo_model, tiny_model

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def marked(model: Path, **settings: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return model


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv' layout"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "masks in the format 'sparse-24-bitmask'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": {"format": "sparse-24-bitmask"}},
            },
            "format 'sparse-24-bitmask'",
        ),
    ],
)
def test_other_layouts_are_refused(model: Path, settings: dict[str, Any], complaint: str) -> None:
    spec = spec_of(model)
    container = CONTAINERS[settings["quant_method"]]
    with pytest.raises(CheckpointError, match=complaint):
        container.open_dense([marked(model, **settings) / "model.safetensors"], spec)


@pytest.mark.parametrize("part", ["weight_g_idx", "weight_zero_point"])
def test_parts_that_change_the_meaning_are_refused(model: Path, part: str) -> None:
    tensors = load_file(model / "model.safetensors")
    rows, columns = tensors[NAME].shape
    module = NAME.removesuffix(".weight")
    tensors[NAME] = torch.zeros(rows, columns, dtype=torch.int8)
    tensors |= {f"{module}.weight_scale": torch.ones(rows, 1), f"{module}.{part}": torch.zeros(1, dtype=torch.int32)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    spec = spec_of(model)
    folder = marked(model, quant_method="compressed-tensors", format="int-quantized")
    with pytest.raises(CheckpointError, match=part):
        CONTAINERS["compressed-tensors"].open_dense([folder / "model.safetensors"], spec)


def test_a_bitsandbytes_weight_without_its_state_is_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[NAME] = torch.zeros(tensors[NAME].numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    spec = spec_of(model)
    folder = marked(model, quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(CheckpointError, match="quant_state.bitsandbytes__nf4"):
        CONTAINERS["bitsandbytes"].open_dense([folder / "model.safetensors"], spec)


@pytest.mark.parametrize(("method", "complaint"), [("hqq", "already quantized (hqq)"), ("compress", "(compress)")])
def test_a_folder_in_a_format_that_is_not_read_is_no_original(model: Path, method: str, complaint: str) -> None:
    marked(model, quant_method=method)
    with pytest.raises(CompressError, match=re.escape(complaint)):
        score_targets([str(demo_model())], str(model), Settings("quick"), Reporter(0))
