"""GGUF: one file that stock llama.cpp runs.

`write` streams tensors to disk through the `gguf` package's writer, `open_dense` goes back through `compress.models.gguf`, which
reads files of any origin, `check_representable` says what llama.cpp would compute differently. Tensor names come from
`TensorSpec.gguf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.codecs.names import stored_bytes
from compress.containers._atomic import atomic_files
from compress.containers._gguf_general import FILE_TYPES, add_general
from compress.containers._hosts import LLAMA
from compress.containers._uses import LLAMA_CPP as LLAMA_CPP_USES
from compress.containers.base import LLAMA_CPP, Container, Files, PlannedTensor, WriteRequest
from compress.errors import CheckpointError, OutputError
from compress.models.gguf.header import read_set, shards
from compress.models.gguf.keys import architecture_keys, drafts_in
from compress.models.gguf.tensors import entries_of, piece_shape, unclaimed
from compress.models.layers.rope import Rope
from compress.models.layers.sparse_latent_attention import SparseLatentAttention
from compress.models.layers.views import Piece
from compress.models.spec import ModelSpec, TensorSpec
from compress.reading import shown

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from torch import Tensor

    from compress.weights import Packed

_METADATA_BYTES = 32 << 20  # room for tokenizer and tensor list when the free space is checked
_ENTRY_BYTES = 56  # of a tensor in the list beside its name and shape, with the padding of its data
_MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS

_FLOATS = ("f32", "f16", "bf16")


# --- what llama.cpp can hold ------------------------------------------------------------------------------------------


def check_representable(spec: ModelSpec) -> list[str]:
    """Reasons why llama.cpp would refuse this model or compute something else; empty when there are none.

    From llama.cpp's src/models/*.cpp and src/llama-model.cpp, as the families declare it. No torch.
    """
    engine, reasons = spec.family.gguf, []
    arch = spec.gguf_arch
    if spec.experts and engine.normalises is not None and engine.normalises != spec.norm_topk:
        always, model = ("always", "does not") if engine.normalises else ("never", "does")
        reasons.append(f"llama.cpp's {arch} {always} normalises the chosen experts' weights; this model {model}")
    if spec.experts and not engine.dense_layers and len(spec.sparse_layers) < spec.layers:
        dense = next(layer for layer in range(spec.layers) if not spec.is_sparse(layer))
        reasons.append(f"llama.cpp's {arch} wants experts in every layer; layer {dense} is dense")
    if spec.experts > _MAX_EXPERTS:
        reasons.append(f"llama.cpp holds at most {_MAX_EXPERTS} experts; this model has {spec.experts}")
    if engine.heads_fill_width and spec.heads * spec.head_dim != spec.hidden_size:
        reasons.append(
            f"llama.cpp's {arch} wants heads x head_dim = hidden_size; {spec.heads} x {spec.head_dim} is not"
        )
    if spec.tied and not engine.tied:
        reasons.append(f"llama.cpp's {arch} has no tied output head")
    sublayers = {s for block in spec.blocks for s in block}
    biases = {w.gguf for s in sublayers for w in s.weights if w.role == "biases"}
    known = engine.biases if engine.biases is not None else biases
    if lost := {name for name in biases if name.removesuffix(".bias") not in known and name not in known}:
        reasons.append(f"llama.cpp's {arch} has no {', '.join(sorted(lost))}")
    others = {a.name for s in sublayers if (a := getattr(s, "activation", None)) is not None} - {engine.activation}
    if others:
        reasons.append(f"llama.cpp's {arch} computes {engine.activation}, not {', '.join(sorted(others))}")
    reasons.extend(engine.problems(spec.read))
    for rope in _ropes(spec):
        reasons.extend(rope.problems(arch, engine.llama3, engine.longrope))
    return reasons


def _ropes(spec: ModelSpec) -> list[Rope]:
    """The rotary positions of the model's mixers, each once."""
    found = (getattr(sublayer, "rope", None) for block in spec.blocks for sublayer in block)
    return list(dict.fromkeys(rope for rope in found if rope is not None))


def heads_fill_width(spec: ModelSpec) -> bool:
    """Whether llama.cpp wants heads x head_dim to be the hidden size, so that no head can go."""
    return spec.family.gguf.heads_fill_width


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file."""
    return stored_bytes(planned.codec, planned.spec.shape)


def caveats(spec: ModelSpec) -> list[str]:
    """Differences that concern long texts only: worth a line in the report, no reason to refuse."""
    lines = []
    windows = not spec.family.gguf.windows
    if windows and spec.sliding_window and spec.sliding_window < spec.max_positions:
        lines.append(
            f"llama.cpp ignores this model's sliding window: texts over {spec.sliding_window} tokens are attended in full"
        )
    if any(rope.type == "dynamic" for rope in _ropes(spec)):
        lines.append(f"llama.cpp ignores dynamic rope scaling: texts over {spec.max_positions} tokens differ")
    if tops := {s.top for block in spec.blocks for s in block if isinstance(s, SparseLatentAttention)}:
        lines.append(
            f"llama.cpp keeps an indexer's keys in half precision: in texts over {min(tops)} tokens, near ties choose other "
            "tokens than the original"
        )
    for rope in _ropes(spec):
        if rope.type == "yarn" and rope.parameters.get("truncate", True) is False:
            lines.append(
                "llama.cpp lets yarn's ramp begin and end at whole channels, this model between them (truncate: false): "
                "positions far apart turn a little otherwise"
            )
        if rope.type == "longrope":
            lines.append(
                f"llama.cpp takes the longer factors of longrope for every text where its context is over {rope.original} "
                "tokens, transformers where the text is"
            )
    return lines


def codec_problem(tensor: TensorSpec, codec: str) -> str | None:
    """Why `tensor` cannot be stored as `codec` in a file llama.cpp runs, or None."""
    if len(tensor.shape) == 1 and codec != "f32":
        return f"{tensor.name} is 1-D: llama.cpp computes with it in f32, not {codec}"
    if tensor.role == "router" and codec not in ("f32", "f16"):
        return f"{tensor.name} is a router: llama.cpp keeps it in f32 or f16, not {codec}"
    if codec not in FILE_TYPES:
        return f"{tensor.name}: {codec} is no GGUF type"
    return None


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One GGUF tensor: a matrix, a vector, part of one, or the stack of a layer's experts."""

    name: str
    codec: str
    shape: tuple[int, ...]
    parts: tuple[TensorSpec, ...]
    piece: Piece


def _entries(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> list[_Entry]:
    groups: dict[str, list[tuple[PlannedTensor, Piece]]] = {}
    for planned in tensors:
        problem = codec_problem(planned.spec, planned.codec)
        if problem:
            raise OutputError(problem)
        for piece in planned.spec.pieces:
            groups.setdefault(piece.name, []).append((planned, piece))
    entries = []
    for name, group in groups.items():
        codecs, shapes = {planned.codec for planned, _ in group}, {planned.spec.shape for planned, _ in group}
        if len(codecs) > 1 or len(shapes) > 1:
            raise OutputError(f"{name} stacks experts of one codec and shape; got {', '.join(sorted(codecs))}")
        parts, piece = [planned.spec for planned, _ in group], group[0][1]
        shape = piece_shape(parts[0], piece)
        if parts[0].expert is not None:
            parts.sort(key=lambda part: part.expert or 0)
            if [part.expert for part in parts] != list(range(spec.experts)):
                raise OutputError(f"{name} needs all {spec.experts} experts, in the plan are {len(parts)}")
            shape = (len(parts), *shape)
        elif len(parts) > 1:
            raise OutputError(f"{name} is planned {len(parts)} times")
        entries.append(_Entry(name, codecs.pop(), shape, tuple(parts), piece))
    return entries


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan the format cannot hold, before anything is computed."""
    _entries(spec, tensors)


def _type(codec: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[codec.upper()]


def _row_bytes(codec: str, columns: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[_type(codec)]
    if columns % block:
        raise OutputError(f"{codec} stores blocks of {block} columns; rows of {columns} do not divide")
    return columns // block * size


def _bytes(entry: _Entry) -> int:
    return math.prod(entry.shape[:-1]) * _row_bytes(entry.codec, entry.shape[-1])


def _rows(packed: Packed, tensor: TensorSpec, codec: str, piece: Piece) -> np.ndarray:
    """The bytes of one piece of a checkpoint's tensor, uint8 [rows, row_bytes], in GGUF's order."""
    import numpy as np
    import torch

    if packed.codec != codec or tuple(packed.shape) != tensor.shape:
        raise OutputError(
            f"{tensor.name} arrived as {packed.codec} {tuple(packed.shape)}, planned as {codec} {tensor.shape}"
        )
    if codec in _FLOATS and (piece.columns is not None or not piece.exact):
        return _converted(packed.parts["values"], piece)
    if piece.columns is not None and "columns" not in packed.parts:
        raise OutputError(f"{tensor.name} was solved in the checkpoint's order of columns, GGUF has another")
    part = packed.parts["values" if codec in _FLOATS else "blocks"].detach().cpu().contiguous()
    rows = math.prod(tensor.shape[:-1])
    data = part.reshape(rows, -1).view(torch.uint8).numpy()
    expected = (rows, _row_bytes(codec, tensor.shape[-1]))
    if data.shape != expected:
        raise OutputError(f"{tensor.name} packs to {data.shape} bytes, {codec} needs {expected}")
    if piece.rows is None:
        return data
    order = piece.rows.index(tensor.shape[0])
    if len(tensor.shape) == 1:
        return np.ascontiguousarray(data.reshape(tensor.shape[0], -1)[order]).reshape(1, -1)
    return np.ascontiguousarray(data[order])


def _converted(values: Tensor, piece: Piece) -> np.ndarray:
    """A piece of a float tensor whose numbers or columns change: its bytes, a row."""
    import numpy as np
    import torch

    dtype, whole = values.dtype, values.detach().cpu().float().numpy()
    if piece.rows is not None:
        whole = whole[piece.rows.index(whole.shape[0])]
    if piece.columns is not None:
        whole = whole[:, piece.columns.index(whole.shape[1])]
    if piece.map is not None:
        whole = piece.map.apply(whole)
    if piece.swapped:
        assert piece.shape is not None
        heads, columns, rows = piece.shape
        whole = whole.reshape(heads, rows, columns).swapaxes(1, 2)
    out = torch.from_numpy(np.array(whole, dtype=np.float32)).to(dtype)
    return out.reshape(1, -1).view(torch.uint8).numpy()


def _stored(entry: _Entry, fetch: Callable[[str], Packed]) -> np.ndarray:
    import numpy as np

    if len(entry.parts) == 1:
        return _rows(fetch(entry.parts[0].name), entry.parts[0], entry.codec, entry.piece)
    out = np.empty((len(entry.parts), _bytes(entry) // len(entry.parts)), dtype=np.uint8)
    for target, tensor in zip(out, entry.parts, strict=True):
        target[:] = _rows(fetch(tensor.name), tensor, entry.codec, entry.piece).reshape(-1)
    return out


def write(request: WriteRequest) -> list[Path]:
    """Write the file, or its shards `name-00001-of-0000N.gguf`, and return the files in order.

    `fetch` is called once per tensor, and only one GGUF tensor (a layer's stacked experts at most) is in memory at a
    time. `request.identity` becomes general.name and its kin, `provenance` lands as string keys (`compress.recipe`, ...).
    OutputError for a plan that does not fit the format or a full disk; UnsupportedModel for a tokenizer llama.cpp has
    no equivalent of. Nothing partial ever has a final name.
    """
    import gguf
    import numpy as np

    spec, options = request.spec, request.options
    path, source = Path(request.path), Path(request.source)
    entries = _entries(spec, request.tensors)
    factors = next((f for rope in _ropes(spec) if (f := rope.factors())), {})
    total = sum(_bytes(entry) for entry in entries)
    split = options.max_shard_size if options.max_shard_size and total > options.max_shard_size else 0
    with atomic_files(path, total + _METADATA_BYTES) as folder:
        writer = gguf.GGUFWriter(folder / path.name, spec.gguf_arch, split_max_size=split)
        try:
            add_general(writer, request)
            _add_architecture(writer, spec)
            if options.tokenizer:
                _add_tokenizer(writer, spec, source)
            else:
                writer.add_tokenizer_model("none")
            for key, value in request.provenance.items():
                writer.add_string(key, value)
            for name, divisors in factors.items():
                writer.add_tensor_info(name, divisors.shape, np.dtype("f4"), divisors.nbytes, _type("f32"))
            for entry in entries:
                writer.add_tensor_info(entry.name, entry.shape, np.dtype("f4"), _bytes(entry), _type(entry.codec))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for divisors in factors.values():
                writer.write_tensor_data(divisors)
            for entry in entries:
                writer.write_tensor_data(_stored(entry, request.fetch))
            writer.flush()
            names = [Path(file.name).name for file in writer.fout or ()]
        finally:
            writer.close()
    return [path.parent / name for name in names]


def _add_architecture(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    for name, value in architecture_keys(spec, drafts_in(spec)).items():
        key = f"{spec.gguf_arch}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))


def _add_tokenizer(writer: gguf.GGUFWriter, spec: ModelSpec, source: Path) -> None:
    from compress.containers._gguf_tokenizer import add_vocabulary, read_vocabulary

    add_vocabulary(writer, read_vocabulary(source, spec.config, spec.vocab_size))


def write_vocabulary(path: Path, source: Path, spec: ModelSpec) -> None:
    """A file of the tokenizer alone, which llama.cpp reads as it will read the one of the finished file."""
    import gguf

    writer = gguf.GGUFWriter(path, spec.gguf_arch)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        _add_architecture(writer, spec)
        _add_tokenizer(writer, spec, source)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


# --- reading ----------------------------------------------------------------------------------------------------------


def inventory(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """gguf name -> (codec, shape) of every tensor in the set, without decoding."""
    return {name: (tensor.type.lower(), tensor.shape) for name, tensor in read_set(path).tensors.items()}


def open_dense(path: Files, spec: ModelSpec) -> Callable[[str], Tensor]:
    """A function that decodes one tensor by its checkpoint name to float32: experts unstacked, q and k rows back in
    transformers' order.

    `path` is the file, its first shard, or the list `write` returned. CheckpointError for missing, unknown or misshapen tensors.
    """
    first = Path(path) if isinstance(path, (str, Path)) else next(iter(path))
    header = read_set(first)
    if unknown := sorted(unclaimed(spec, header)):
        raise CheckpointError(f"{first} holds {shown(unknown[0])}, which this architecture does not have")
    entries = entries_of(spec, header)
    return lambda name: entries[name].read(name).float()


def _no_place(tensor: TensorSpec) -> str | None:
    """Why a tensor beside the decoder is not in the file, or None."""
    if tensor.gguf:
        return None
    if tensor.carried:
        return "it holds the language model alone; llama.cpp reads other parts from a file of their own (mmproj)"
    return "this version writes no such layer for this architecture"


def load_dense(path: Files, spec: ModelSpec) -> dict[str, Tensor]:
    """All tensors of `open_dense` at once."""
    load = open_dense(path, spec)
    return {tensor.name: load(tensor.name) for tensor in spec.tensors() if tensor.gguf}


# --- what is said about it --------------------------------------------------------------------------------------------


def _heads_stay(spec: ModelSpec) -> str | None:
    if not heads_fill_width(spec):
        return None
    return f"llama.cpp's {spec.gguf_arch} takes no fewer heads than fill the hidden size"


def _require_vocabulary(source: Path, spec: ModelSpec) -> None:
    from compress.containers._gguf_tokenizer import read_vocabulary

    read_vocabulary(source, spec.config, spec.vocab_size)


def entry_bytes(planned: PlannedTensor) -> int:
    """About what the list of tensors takes of one; the experts of a layer are one there, as which the first counts."""
    tensor = planned.spec
    if tensor.expert:
        return 0
    return sum(len(p.name) + _ENTRY_BYTES + 8 * len(piece_shape(tensor, p)) for p in tensor.pieces)


def _copied_bytes(source: Path) -> int:
    from compress.containers._gguf_tokenizer import vocabulary_bytes

    return vocabulary_bytes(source)


def _codecs(files: Sequence[Path], spec: ModelSpec) -> dict[str, str]:
    stored = inventory(files[0])
    return {tensor.name: stored[tensor.pieces[0].name][0] for tensor in spec.tensors() if tensor.gguf}


CONTAINER = Container(
    name="gguf",
    rank=1,
    usual="Q4_K_M",
    engines="llama.cpp and what is built on it",
    kinds=frozenset({"float", "ggml"}),
    precise_float="f32",
    no_place=_no_place,
    pieces=True,
    masks="GGUF has no sparse types: zeros take as many bits as other weights",
    suffix=".gguf",
    magic=b"GGUF",
    files=shards,
    engine=LLAMA_CPP,
    hosts=(LLAMA,),
    library="gguf",
    uses=LLAMA_CPP_USES,
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    copied_bytes=_copied_bytes,
    unrepresentable=check_representable,
    caveats=caveats,
    heads_stay=_heads_stay,
    require=_require_vocabulary,
    write_vocabulary=write_vocabulary,
    check_plan=check_plan,
    write=write,
    open_dense=open_dense,
    inventory=_codecs,
)
