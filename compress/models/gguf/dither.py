"""A quantized model made one of ordinary floats, for measurements.

Weights that were read from a GGUF lie on its grid, and results on them flatter every format that has that grid. Noise of half a
step takes them off it: the result is as far from the quantized model as that was from the one before it, in a direction of
its own, and is the original that formats are then compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UnsupportedModel
from compress.models.checkpoint import Checkpoint, own_codec
from compress.models.companions import LAYOUT, LEGAL, copy_companions
from compress.models.gguf.tensors import Decoded, Part
from compress.models.index import FLOAT_CODEC, INDEX
from compress.models.locate import model_location
from compress.models.spec import TensorSpec, load_spec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

STEPS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types whose values are evenly spaced in a block of 32, by the float16 that the block begins with."""


def dither(model: str | Path, folder: Path, seed: int = 0) -> Path:
    """Write the model of a GGUF file to `folder`, a folder in Hugging Face's layout in the model's float type: to every quantized
    weight uniform noise in [-step/2, step/2] is added, step being the distance of neighbouring values of its block.

    The same bytes for the same file and seed. One block's tensors are in memory at a time. Raises UnsupportedModel for a model
    that is not quantized, or of other types than `STEPS`; CheckpointError.
    """
    import torch
    from safetensors.torch import save_file

    checkpoint = Checkpoint.open(model_location(str(model)))
    spec = load_spec(checkpoint.config)
    entries = {name: entry for name, entry in checkpoint.entries.items() if isinstance(entry, Decoded)}
    coarse = {part.stored.type for e in entries.values() for part in e.parts if part.stored.type not in FLOAT_CODEC}
    if not coarse or coarse - {*STEPS}:
        found = ", ".join(sorted(coarse)) or "none"
        raise UnsupportedModel(f"{model} has the quantized types {found}; noise is added to {', '.join(STEPS)}")
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[own_codec(spec, checkpoint)]
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_units(spec.tensors())):
        file = f"model-{number:05d}.safetensors"
        values = {
            t.name: _noisy(entries[t.name], [seed, number, place]).to(dtype).contiguous()
            for place, t in enumerate(tensors)
        }
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
    copy_companions(checkpoint.folder, folder, LEGAL + LAYOUT)
    (folder / "README-original.md").rename(folder / "README.md")
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nUniform noise of half a step (seed {seed}) was added to its quantized weights.\n")
    return folder


def _units(tensors: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Tensors that are held together: those of a block, and single ones beside the blocks."""
    for layer, group in groupby(tensors, key=lambda tensor: tensor.layer):
        together = list(group)
        yield from [together] if layer is not None else ([tensor] for tensor in together)


def _noisy(entry: Decoded, seed: Sequence[int]) -> Tensor:
    """One tensor, float32, with noise where it was quantized."""
    import numpy as np
    import torch

    random = np.random.default_rng(list(seed))
    pieces = []
    for part in entry.parts:
        values = part.decoded()
        if part.stored.type not in FLOAT_CODEC:
            noise = random.random(values.shape, dtype=np.float32) - np.float32(0.5)
            values = values + noise * _steps(part)
        pieces.append((part.piece, values))
    return torch.from_numpy(entry.restored(pieces))


def _steps(part: Part) -> np.ndarray:
    """The distance of neighbouring values around every weight, float32, of the part's shape."""
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[part.stored.type]]
    blocks = part.blocks().reshape(-1, size)
    scales = np.abs(np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32))
    return np.repeat(scales, block).reshape(part.shape)
