"""What the container tests share: checkpoints as Packed values, reference logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from compress.codecs.names import codec_info
from compress.models import ModelSpec, TensorSpec, load_spec
from compress.models.checkpoint import Checkpoint
from compress.weights import Packed

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Planned:
    spec: TensorSpec
    codec: str
    wanted: str | None = None


def spec_of(folder: Path) -> ModelSpec:
    return load_spec(json.loads((folder / "config.json").read_text()))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """What its files hold, and the parts of what is stacked or fused there."""
    out: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        out.update(load_file(file))
    checkpoint = Checkpoint.open(folder)
    return out | {name: checkpoint.load(name) for name, entry in checkpoint.entries.items() if entry.part}


def plan(spec: ModelSpec, codec: str = "f32") -> list[Planned]:
    """Matrices in `codec`; norms, biases and routers in f32."""
    return [
        Planned(tensor, "f32" if len(tensor.shape) == 1 or tensor.role == "router" else codec)
        for tensor in spec.tensors()
    ]


def fetcher(weights: Mapping[str, torch.Tensor], planned: list[Planned]) -> Callable[[str], Packed]:
    codecs = {line.spec.name: line.codec for line in planned}

    def fetch(name: str) -> Packed:
        values = weights[name].to(DTYPES[codecs[name]])
        return Packed(codecs[name], tuple(values.shape), {"values": values})

    return fetch


def token_ids(count: int = 40, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, count)


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' logits in float32, [tokens, vocab] of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def uniform_packed(codec: str, shape: tuple[int, ...], seed: int) -> Packed:
    """Random codes over the whole range of an intN codec; decoded rows have a norm of about two."""
    info, random = codec_info(codec), torch.Generator().manual_seed(seed)
    (rows, columns), levels = shape, 2**info.bits
    groups = columns // info.block if info.block else 1
    codes = torch.randint(0, levels, (rows, columns), generator=random).to(torch.uint8)
    codes[0, :2] = torch.tensor([0, levels - 1])
    zeros = torch.full((rows, groups), levels // 2, dtype=torch.uint8)
    if not info.symmetric:
        zeros = torch.randint(levels // 4, 3 * levels // 4, (rows, groups), generator=random).to(torch.uint8)
        zeros[:2, 0] = torch.tensor([0, levels - 1])
    scales = (0.5 + torch.rand(rows, groups, generator=random)) * (7 / levels / columns**0.5)
    return Packed(codec, shape, {"codes": codes, "scales": scales.half(), "zeros": zeros})


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, str, tuple[int, ...], np.ndarray]]]:
    """Metadata, and lazily (gguf name, codec, shape, float32 values) of every tensor, through gguf's own reader: an oracle of
    ours."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}

    def tensors() -> Iterator[tuple[str, str, tuple[int, ...], np.ndarray]]:
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, tensor.tensor_type.name.lower(), shape, np.asarray(values, np.float32).reshape(shape)

    return fields, tensors()
