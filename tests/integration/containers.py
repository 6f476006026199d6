"""What the container tests share: checkpoints as Packed values, reference logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from compress.models import ModelSpec, TensorSpec, load_spec
from compress.weights import Packed

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Planned:
    spec: TensorSpec
    codec: str


def spec_of(folder: Path) -> ModelSpec:
    return load_spec(json.loads((folder / "config.json").read_text()))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        out.update(load_file(file))
    return out


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

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()
