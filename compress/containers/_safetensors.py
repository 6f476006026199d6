"""Streaming safetensors: sharded files whose tensors are produced one source at a time.

The format: 8 bytes little-endian header length, a JSON header, the data without holes (safetensors README).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codecs.names import codec_info
from compress.containers._atomic import atomic_folder
from compress.containers.base import PlannedTensor, WriteRequest
from compress.errors import OutputError
from compress.models.companions import LAYOUT, LEGAL, PROVENANCE, copy_companions

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.spec import TensorSpec

_NOT_CARRIED = ("torch_dtype", "_name_or_path", "auto_map", "transformers_weights")
"""Keys of the original's config.json: what stands elsewhere, where it lay, and names of files that do not go along."""
_COMPANION_BYTES = 32 << 20  # room for tokenizer and configs when the free space is checked
_SHARD_BYTES = 5_000_000_000
_ENTRY_BYTES = 85  # a header spends on a tensor beside its name
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
FLOATS = {"f32": ("F32", "float32"), "f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
"""Float codecs: their safetensors and their torch name."""


@dataclass(frozen=True)
class Slot:
    """One tensor to come: its name, safetensors dtype ("F32", "I32", "U8", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


def total_bytes(sources: Iterable[tuple[str, Sequence[Slot]]]) -> int:
    return sum(slot.bytes for _, slots in sources for slot in slots)


def dense_entry_bytes(planned: PlannedTensor) -> int:
    """About what a header takes of a tensor that is one of the file; of those that are stacked, the first does."""
    if planned.spec.declared.stacked and planned.spec.expert:
        return 0
    return len(planned.spec.name) + _ENTRY_BYTES


def entry_bytes(planned: PlannedTensor) -> int:
    """The same where the parts of a coded tensor are tensors of the file."""
    return dense_entry_bytes(planned) * _parts(planned)


def _parts(planned: PlannedTensor) -> int:
    """Tensors of the file that a tensor becomes."""
    info = codec_info(planned.codec)
    codecs = [codec_info(part) for part in info.parts] if planned.factors else [info]
    each = [(1 if not c.bits else 2 if c.symmetric else 3) + (c.kind == "sparse") for c in codecs]
    return sum(each) + (2 if planned.incoherence else 0)


def write_checkpoint(
    request: WriteRequest,
    sources: Sequence[tuple[str, Sequence[Slot]]],
    produce: Callable[[str], Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> list[Path]:
    """The folder `request.path`: weights, the model's config.json with `settings` (dtype, quantization_config) on top,
    the companions of the model folder, compress.json; returns the weight files in order.

    sources, produce: as in `write_shards`; beside: more files, by name: text, or what becomes JSON. OutputError for a full
    disk or a folder that holds something else.
    """
    path, options = Path(request.path), request.options
    sources, produce = _stacked(request.tensors, sources, produce)
    with atomic_folder(path, total_bytes(sources) + _COMPANION_BYTES, replace=options.replace) as folder:
        files = write_shards(folder, sources, produce, options.max_shard_size or _SHARD_BYTES)
        config = {key: value for key, value in request.spec.config_json.items() if key not in _NOT_CARRIED}
        for name, value in {"config.json": {**config, **settings}, **(beside or {})}.items():
            if isinstance(value, str):
                (folder / name).write_text(value, encoding="utf-8")
            else:
                write_json(folder / name, value)
        copy_companions(Path(request.source), folder, LEGAL + LAYOUT)
        if request.tokenizer_settings is not None:
            write_json(folder / "tokenizer_config.json", request.tokenizer_settings)
        write_json(folder / PROVENANCE, request.provenance)
    return [path / file.name for file in files]


def _stacked(
    tensors: Sequence[PlannedTensor],
    sources: Sequence[tuple[str, Sequence[Slot]]],
    produce: Callable[[str], Mapping[str, Tensor]],
) -> tuple[list[tuple[str, Sequence[Slot]]], Callable[[str], Mapping[str, Tensor]]]:
    """The same with one source for what transformers reads out of one tensor only, as sub-layers declare it (`Weight.stacked`):
    the floats of a layer's experts, of which then all are in memory together."""
    plain = {source for source, slots in sources if [slot.name for slot in slots] == [source]}
    home = {
        t.spec.name: t.spec.name.removesuffix(t.spec.declared.name) + t.spec.declared.slices[0].name
        for t in tensors
        if t.spec.declared.stacked and t.spec.name in plain
    }
    members: dict[str, list[TensorSpec]] = {}
    for t in tensors:
        if t.spec.name in home:
            members.setdefault(home[t.spec.name], []).append(t.spec)
    merged = {home.get(source, source): slots for source, slots in reversed(sources)}
    for whole, parts in members.items():
        merged[whole] = [Slot(whole, merged[whole][0].dtype, _whole(parts))]

    def produced(source: str) -> Mapping[str, Tensor]:
        if source not in members:
            return produce(source)
        import torch

        out = torch.empty(0)
        for part in members[source]:
            where, values = part.declared.slices[0], produce(part.name)[part.name]
            if not out.numel():
                out = torch.empty(merged[source][0].shape, dtype=values.dtype)
            room = out if where.index is None else out[where.index]
            room = room.mT if where.transposed else room
            room[where.start : where.stop : where.step] = values
        return {source: out}

    order = dict.fromkeys(home.get(source, source) for source, _ in sources)
    return [(source, merged[source]) for source in order], produced


def _whole(parts: Sequence[TensorSpec]) -> tuple[int, ...]:
    """The shape of the tensor that all of these are slices of."""
    entries, first = {part.declared.slices[0].index for part in parts}, parts[0].declared.slices[0]
    rows = sum(part.shape[0] for part in parts) // len(entries)
    inside = (rows, *parts[0].shape[1:])
    return (*(() if first.index is None else (len(entries),)), *(inside[::-1] if first.transposed else inside))


def write_shards(
    folder: Path,
    sources: Sequence[tuple[str, Sequence[Slot]]],
    produce: Callable[[str], Mapping[str, Tensor]],
    max_shard_size: int,
) -> list[Path]:
    """Write model.safetensors, or numbered shards and their index, into `folder`; returns the files in order.

    Every source (one checkpoint tensor) becomes the slots listed with it; `produce(source)` is called once each, in
    order, so one source is in memory at a time. OutputError if what it returns differs from the slots.
    """
    shards: list[list[tuple[str, Sequence[Slot]]]] = [[]]
    size = 0
    for source, slots in sources:
        needed = sum(slot.bytes for slot in slots)
        if shards[-1] and size + needed > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append((source, slots))
        size += needed
    count, files, index = len(shards), [], {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(folder / name, shard, produce)
        files.append(folder / name)
        index.update({slot.name: name for _, slots in shard for slot in slots})
    if count > 1:
        text = {"metadata": {"total_size": total_bytes(sources)}, "weight_map": dict(sorted(index.items()))}
        write_json(folder / "model.safetensors.index.json", text)
    return files


def _write_file(
    path: Path, sources: Sequence[tuple[str, Sequence[Slot]]], produce: Callable[[str], Mapping[str, Tensor]]
) -> None:
    import torch

    # wide types first, as the reference writer does: every tensor stays aligned without holes
    slots = sorted((slot for _, group in sources for slot in group), key=lambda slot: -_SIZES[slot.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for slot in slots:
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.bytes],
        }
        offsets[slot.name] = position
        position += slot.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        start = file.tell()
        file.truncate(start + position)
        for source, group in sources:
            tensors = produce(source)
            for slot in group:
                data = tensors[slot.name].detach().cpu().contiguous()
                if tuple(data.shape) != slot.shape or data.numel() * data.element_size() != slot.bytes:
                    raise OutputError(f"{slot.name} came out as {tuple(data.shape)} {data.dtype}, planned {slot}")
                file.seek(start + offsets[slot.name])
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
