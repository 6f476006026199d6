"""Dense safetensors: the compressed weights decoded to a float type, loadable by anything that reads the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.codecs.names import KIND_NAMES, stored_bytes
from compress.containers._hosts import VLLM, WHOLE
from compress.containers._safetensors import FLOATS, Slot, dense_entry_bytes, write_checkpoint
from compress.containers._uses import CHAT, SERVERS, transformers
from compress.containers.base import (
    ROUNDED_TOLERANCE,
    TRANSFORMERS,
    Container,
    Files,
    PlannedTensor,
    WriteRequest,
    folder_of,
)
from compress.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(planned: PlannedTensor, own: str) -> int:
    """Bytes of one tensor in the file: those of its values in the checkpoint's own float type."""
    return stored_bytes(_codec(planned, own), planned.spec.shape)


def _codec(planned: PlannedTensor, own: str) -> str:
    return planned.codec if planned.spec.carried else own


def write(request: WriteRequest) -> list[Path]:
    """Write the folder (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    Every tensor is decoded by its codec and rounded to `options.dtype`, but for those that go along as they are. `fetch` is
    called once per tensor. OutputError for a full disk or a folder that holds something else.
    """
    import torch

    from compress.decode import decode

    codecs = {planned.spec.name: _codec(planned, request.options.dtype) for planned in request.tensors}

    def produce(tensor: str) -> dict[str, Tensor]:
        return {tensor: decode(request.fetch(tensor)).to(getattr(torch, FLOATS[codecs[tensor]][1]))}

    sources = [
        (p.spec.name, [Slot(p.spec.name, FLOATS[codecs[p.spec.name]][0], p.spec.shape)]) for p in request.tensors
    ]
    return write_checkpoint(request, sources, produce, {"dtype": FLOATS[request.options.dtype][1]})


def open_dense(path: Files, spec: ModelSpec) -> Callable[[str], Tensor]:
    """A function that reads one tensor of a dense folder by its checkpoint name."""
    from compress.models.checkpoint import Checkpoint

    return Checkpoint.open(folder_of(path)).load


CONTAINER = Container(
    name="safetensors",
    rank=7,
    usual="",
    engines="whatever runs the original; dense",
    kinds=frozenset(KIND_NAMES),  # every codec as the values it decodes to
    incoherence=True,
    dense=True,
    masks="it is dense: it holds the zeros, or the product of the factors",
    original=True,
    engine=TRANSFORMERS,
    hosts=(WHOLE, VLLM),
    tolerance=ROUNDED_TOLERANCE,
    library="transformers",
    uses=(transformers(), *SERVERS, CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=dense_entry_bytes,
    write=write,
    open_dense=open_dense,
)
