"""Dense safetensors: the compressed weights decoded to a float type, loadable by anything that reads the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.containers._safetensors import Options as FolderOptions
from compress.containers._safetensors import Slot, folder_of, write_checkpoint
from compress.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.containers.gguf import PlannedTensor
    from compress.weights import Packed

_DTYPES = {"f32": ("F32", "float32"), "f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}


@dataclass(frozen=True)
class Options(FolderOptions):
    """`dtype` f32, f16 or bf16; `max_shard_size` in bytes; `replace` an existing folder."""

    dtype: str = "bf16"


def write(
    path: Path,
    spec: ModelSpec,
    tensors: Sequence[PlannedTensor],
    fetch: Callable[[str], Packed],
    *,
    source: Path,
    options: Options | None = None,
    provenance: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the folder `path` (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    Every tensor is decoded by its codec and rounded to `options.dtype`. `fetch` is called once per tensor, in file
    order; one tensor is in memory at a time. OutputError for a full disk or a folder that holds something else.
    """
    import torch

    from compress.solve.tensor import decode

    options = options or Options()
    kind, name = _DTYPES[options.dtype]
    dtype = getattr(torch, name)

    def produce(tensor: str) -> dict[str, Tensor]:
        packed = fetch(tensor)
        return {tensor: decode(packed).to(dtype)}

    sources = [(planned.spec.name, [Slot(planned.spec.name, kind, planned.spec.shape)]) for planned in tensors]
    return write_checkpoint(
        path, spec, sources, produce, {"dtype": name}, source=source, options=options, provenance=provenance
    )


def open_dense(path: Path | Iterable[Path], spec: ModelSpec) -> Callable[[str], Tensor]:
    """A function that reads one tensor of a dense folder by its checkpoint name."""
    from compress.models.checkpoint import Checkpoint

    return Checkpoint.open(folder_of(path)).load
