"""LoRA adapters merged into a checkpoint: W + scale B A, worked out here in float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import CheckpointError, CompressError, NoSuchModel, UnsupportedModel
from compress.models.adapter import open_adapter
from compress.models.checkpoint import Checkpoint, checksums
from compress.models.layers.base import Slice
from tests.tiny import tiny_model

SMALL = {"vocab_size": 300, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "tokenizer": False}
Q, DOWN, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("base") / "model", dtype="bfloat16", **SMALL)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


TENSORS = {
    f"base_model.model.{Q}.lora_A.weight": random(4, 48, seed=1), f"base_model.model.{Q}.lora_B.weight": random(48, 4, seed=2),
    f"base_model.model.{DOWN}.lora_A.weight": random(2, 96, seed=3).bfloat16(),
    f"base_model.model.{DOWN}.lora_B.weight": random(48, 2, seed=4).bfloat16(),
    f"base_model.model.{EMBED}.lora_embedding_A": random(4, 300, seed=5),
    f"base_model.model.{EMBED}.lora_embedding_B": random(48, 4, seed=6),
    f"base_model.model.{NORM}": random(48, seed=7),
}  # fmt: skip


def adapter(folder: Path, tensors: dict[str, Tensor] = TENSORS, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": "owner/base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**given, **settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def product(name: str, kind: str = "lora_{}.weight") -> Tensor:
    low, high = (TENSORS[f"base_model.model.{name}.{kind.format(part)}"].double() for part in "AB")
    return high @ low


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (4.0, 8.0)),
        ({"use_rslora": True}, (8.0, 16 / sqrt(2))),
        ({"lora_alpha": 8.5, "alpha_pattern": {"mlp.down_proj": 3, "k_proj": 99}}, (8.5 / 4, 1.5)),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}, "rank_pattern": {"down_proj": 2}}, (0.5, 8.0)),
    ],
)
def test_what_is_merged(model: Path, tmp_path: Path, settings: dict[str, Any], scales: tuple[float, float]) -> None:
    """The rank is that of the tensors, whatever the pattern of ranks says."""
    plain, merged = Checkpoint.open(model), Checkpoint.open(model, adapter=adapter(tmp_path / "lora", **settings))
    expected = {f"{Q}.weight": scales[0] * product(Q), f"{DOWN}.weight": scales[1] * product(DOWN)}
    scale = 16 / 4 if "lora_alpha" not in settings else 8.5 / 4
    scale = 8.0 if settings.get("use_rslora") else scale
    expected[f"{EMBED}.weight"] = scale * product(EMBED, "lora_embedding_{}").T
    assert set(merged.entries) == set(plain.entries)
    assert merged.weight_files == plain.weight_files
    for name in plain.entries:
        found, before = merged.load(name), plain.load(name)
        if name in expected:
            assert found.dtype == torch.float32 and merged.entries[name].codec == "bf16"
            torch.testing.assert_close(found.double(), before.double() + expected[name], rtol=1e-6, atol=1e-6)
        elif name == NORM:
            assert torch.equal(found, TENSORS[f"base_model.model.{NORM}"])
        else:
            assert torch.equal(found, before) and found.dtype == torch.bfloat16
    assert merged.notes == ("the adapter lora is merged into 3 tensors in float32, 1 more are its own",)
    names = set(checksums(merged)) - set(checksums(plain))
    assert names == {"adapter_config.json", "adapter_model.safetensors"} and len(merged.deciding) == 3


@pytest.mark.parametrize("by", ["part", "whole"])
def test_tensors_that_are_stored_in_another(model: Path, tmp_path: Path, by: str) -> None:
    """As q, k and v in one: adapters are for the parts, or for the whole where its class has it so."""
    entries, whole = Checkpoint.open(model).entries, f"{Q}.weight"
    part = {"shape": (16, 48), "part": Slice(whole, start=20, stop=36)}
    low, high = random(2, 48, seed=1), random(48, 2, seed=2)
    name, rows = (whole, high) if by == "whole" else ("m.weight", high[20:36])
    root = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    lora = open_adapter(adapter(tmp_path, {f"{root}A.weight": low, f"{root}B.weight": rows}))
    if by == "whole":
        entry = replace(lora.merged(entries)[whole], **part)
    else:
        entry = lora.merged({"m.weight": replace(entries[whole], **part)})["m.weight"]
    with entry.opened() as opened:
        found = entry.read("m.weight", opened)
    expected = load_file(model / "model.safetensors")[whole].double() + 8 * high.double() @ low.double()
    torch.testing.assert_close(found.double(), expected[20:36], rtol=1e-6, atol=1e-6)


def test_a_quantized_model_takes_an_adapter(model: Path, tmp_path: Path) -> None:
    """As QLoRA trains one: onto what the codes decode to."""
    tensors = load_file(model / "model.safetensors")
    codes, scale = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn), torch.rand(48, 1)
    shutil.copytree(model, tmp_path / "fp8")
    save_file(tensors | {f"{Q}.weight": codes, f"{Q}.weight_scale": scale}, tmp_path / "fp8" / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    merged = Checkpoint.open(tmp_path / "fp8", adapter=adapter(tmp_path / "lora"))
    expected = codes.double() * scale.double() + 4 * product(Q)
    torch.testing.assert_close(merged.load(f"{Q}.weight").double(), expected, rtol=1e-6, atol=1e-6)
    assert merged.entries[f"{Q}.weight"].quantized and len(merged.notes) == 2


REFUSED: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
    ({"peft_type": "LOHA"}, TENSORS, "kind 'LOHA'; LoRA is merged here"),
    ({"use_dora": True}, TENSORS, "DoRA, which scales every row"),
    ({"layer_replication": [[0, 2]]}, TENSORS, "layer_replication"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, TENSORS, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_16"}, TENSORS, "changes the model's own weights"),
    ({}, {**TENSORS, f"base_model.model.{Q}.lora_magnitude_vector": random(48, seed=1)}, "lora_magnitude_vector"),
    ({}, {"other.q_proj.lora_A.weight": random(4, 48, seed=1)}, "other.q_proj"),
    ({}, {f"base_model.model.{Q}.lora_A.weight": random(4, 48, seed=1)}, "lora_A"),
    ({}, {f"base_model.model.{Q}.lora_B.weight": random(48, 4, seed=1)}, "lora_B"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "tensors", "words"), REFUSED)
def test_what_is_no_plain_low_rank_is_refused_with_a_hint(
    model: Path, tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words) as error:
        Checkpoint.open(model, adapter=adapter(tmp_path, tensors, **settings))
    assert "merge_and_unload" in str(error.value) and "\n" not in str(error.value)


def test_adapters_of_another_model_or_damaged_ones(model: Path, tmp_path: Path) -> None:
    def refused(kind: type[CompressError], words: str, folder: Path) -> None:
        with pytest.raises(kind, match=words):
            Checkpoint.open(model, adapter=folder)

    name = f"base_model.model.{Q}.lora_"
    wide = {f"{name}A.weight": random(4, 64, seed=1), f"{name}B.weight": random(48, 4, seed=1)}
    refused(CheckpointError, r"is for a .*q_proj.weight of \[48, 64\].*trained on owner/base", adapter(tmp_path, wide))
    deeper = {key.replace("layers.0", "layers.7"): value for key, value in TENSORS.items()}
    refused(CheckpointError, "is for model.layers.7.*does not have", adapter(tmp_path, deeper))
    refused(CheckpointError, "lora_alpha: expected", adapter(tmp_path, lora_alpha="x"))
    (tmp_path / "adapter_model.safetensors").unlink()
    adapter(tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").rename(tmp_path / "bin" / "adapter_model.bin")
    refused(CheckpointError, "has no adapter_model.safetensors; save the adapter anew", tmp_path / "bin")
    refused(NoSuchModel, "no adapter at", tmp_path / "nowhere")
