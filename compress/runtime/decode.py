"""Some rows of a stored tensor as numbers: fast look-ups for the codecs that have them, the codec itself for the others.

All codes in a byte are looked up in a table at once (eight columns of E8P by their 16 bits). An entry of up to 16
bytes is fetched as one number, several times faster than as a row of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from compress.codecs import get_codec
from compress.codecs.base import BlockCodec
from compress.codecs.names import CodecInfo, codec_info, mask_bits
from compress.codecs.packing import unpack_bits
from compress.codecs.sparse import combinations_table
from compress.weights import Packed

_OF_WIDTH = {4: torch.float32, 8: torch.float64, 16: torch.complex128}
Rows = slice | Tensor
"""Rows a to b (multiples of what the codec codes together), or int64 [k] of any rows."""


def decode_rows(
    codec: str, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Values [k, n] of `dtype` and, where a codec has one scale a row, those scales float32 [k, 1], still to be
    multiplied.

    shape: of the whole matrix; parts: as stored in the container (`stored_parts`), without the signs of incoherence; for
    sparse codecs also "starts" (`codecs.sparse.row_starts`).
    """
    info = codec_info(codec)
    if info.kind == "uniform":
        values, scale = _uniform(info.bits, info.symmetric, shape[1], parts, rows)
        return values.to(dtype), scale
    if info.kind == "float":
        return parts["values"][rows].to(dtype), None
    if info.kind == "sparse":
        return _sparse(info, shape[1], parts, rows, dtype)
    if info.kind == "bnb":
        return _four_bit(codec, shape[1], parts, rows).to(dtype), None
    if codec in ("e8p", "e8p3", "e8p4"):
        return _e8p(codec, shape[1], parts, rows, dtype), parts["scales"][rows].float()[:, None]
    if codec in ("trellis2", "trellis3", "trellis4"):
        return _trellis(codec, shape[1], parts, rows).to(dtype), parts["scales"][rows].float()[:, None]
    coder = get_codec(codec)
    if isinstance(coder, BlockCodec) and type(coder).unpack is BlockCodec.unpack:
        return _blocks(coder, shape[1], parts["blocks"][rows]).to(dtype), None
    return _by_codec(codec, shape, parts, rows).to(dtype), None


def _by_codec(codec: str, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Any codec, by its own `unpack`: of the rows alone where each has its own entry in every part."""
    if all(part.dim() and part.shape[0] == shape[0] for part in parts.values()):
        chosen = {name: part[rows] for name, part in parts.items()}
        return get_codec(codec).unpack(Packed(codec, (len(next(iter(chosen.values()))), shape[1]), chosen))
    return get_codec(codec).unpack(Packed(codec, shape, dict(parts)))[rows]


def _blocks(coder: BlockCodec, columns: int, blocks: Tensor) -> Tensor:
    """ggml's blocks, uint8 [k, row_bytes] -> float32 [k, n]: `BlockCodec.unpack` without columns of repeated scales."""
    units, scale, offset = coder.unpack_blocks(blocks.reshape(-1, coder.block_bytes))
    values = units.reshape(*scale.shape, coder.sub) * scale[..., None]
    if offset is not None:
        values -= offset[..., None]
    return values.reshape(len(blocks), columns)


# -- intN --------------------------------------------------------------------------------------------------------------
def _uniform(
    bits: int, symmetric: bool, columns: int, parts: Mapping[str, Tensor], rows: Rows
) -> tuple[Tensor, Tensor | None]:
    scales = parts["scales"][rows].float()
    count, groups = scales.shape
    values = _codes(parts["codes"][rows], bits, columns, 2 ** (bits - 1) if symmetric else 0)
    if symmetric and groups == 1:
        return values, scales
    grouped = values.reshape(count, groups, -1)
    if not symmetric:
        grouped.sub_(_codes(parts["zeros"][rows], bits, groups)[..., None])
    return grouped.mul_(scales[..., None]).reshape(count, columns), None


def _codes(data: Tensor, bits: int, n: int, middle: int = 0) -> Tensor:
    """uint8 [k, b] as `pack_bits` wrote it -> float32 [k, n], a tensor of its own: codes minus `middle`."""
    if bits == 8:
        return data.float().sub_(middle)
    if bits == 3:
        whole = functional.pad(data, (0, -data.shape[1] % 3)).reshape(len(data), -1, 3).to(torch.int32)
        words = whole[..., 0] | whole[..., 1] << 8 | whole[..., 2] << 16
        index = torch.stack((words & 0xFFF, words >> 12), dim=2)
    else:
        index = data.to(torch.int32)
    return _look_up(index, _code_table(bits, middle, data.device)).reshape(len(data), -1)[:, :n].contiguous()


@cache
def _code_table(bits: int, middle: int, device: torch.device) -> Tensor:
    """Entry i: the codes that the bits of i consist of, the lowest first, minus `middle`. For bits 2 and 4 i is a byte,
    for 3 it has 12 bits; float32 [256, 8 / bits] or [4096, 4]."""
    width = 12 if bits == 3 else 8
    shifts = torch.arange(0, width, bits, device=device)
    codes = (torch.arange(1 << width, device=device)[:, None] >> shifts) & ((1 << bits) - 1)
    return (codes - middle).float()


# -- masks -------------------------------------------------------------------------------------------------------------
def _sparse(
    info: CodecInfo, columns: int, parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Every column looks up its value: where the values of its group of columns start, plus its place among those that
    stay there; all that do not look at a zero in front."""
    assert isinstance(rows, slice)
    first, last = parts["starts"][[rows.start, rows.stop]].tolist()
    if not info.bits:
        values = parts["values"][first:last].to(dtype)
    else:
        start = first // 8 * 8  # eight codes fill whole bytes
        run = parts["codes"][start * info.bits // 8 : -(-last * info.bits // 8)]
        middle = 2 ** (info.bits - 1) if info.symmetric else 0
        values = _codes(run[None], info.bits, last - start, middle)[0, first - start :]
    index = _places(info, columns, parts["mask"][rows])
    out = torch.cat((values.new_zeros(1), values)).index_select(0, index).reshape(-1, columns)
    if not info.bits:
        return out, None
    scales = parts["scales"][rows].float()
    grouped = out.reshape(*scales.shape, -1)
    if not info.symmetric:
        zeros = _codes(parts["zeros"][rows], info.bits, scales.shape[1])[..., None]
        grouped.sub_(zeros * (index > 0).reshape(grouped.shape))
    elif scales.shape[1] == 1:
        return out.to(dtype), scales
    return grouped.mul_(scales[..., None]).reshape(-1, columns).to(dtype), None


def _places(info: CodecInfo, columns: int, mask: Tensor) -> Tensor:
    """One more than each column's place among all kept values of some rows, 0 where nothing is kept; int32 [k * columns].

    mask: their bytes.
    """
    count, table = _mask_table(info.keep, info.of, mask.device)
    if info.of:
        bits, many = mask_bits(info.name), columns // info.of
        numbers = _codes(mask, bits, many) if bits in (2, 3, 4, 8) else unpack_bits(mask, bits, many)
        groups = numbers.reshape(-1).int()
        starts = torch.arange(len(groups), dtype=torch.int32, device=mask.device) * info.keep
    else:
        groups = mask.reshape(-1).int()
        counts = count.index_select(0, groups)
        starts = counts.cumsum(0, dtype=torch.int32) - counts
    places = table.index_select(0, groups).add_(starts[:, None]).clamp_min_(0)
    if not info.of and columns % 8:
        places = places.reshape(len(mask), -1)[:, :columns]
    return places.reshape(-1)


@cache
def _mask_table(keep: int, of: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the number of a group's mask: how many columns stay [m], and one more than the place of each among them, far
    below zero for those that do not, [m, of]; a group is a byte's eight columns where `of` is 0. int32."""
    if of:
        kept = combinations_table(keep, of, device)
    else:
        kept = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1 > 0
    places = kept.int().cumsum(1, dtype=torch.int32)
    return kept.int().sum(1, dtype=torch.int32), torch.where(kept, places, torch.iinfo(torch.int32).min // 2)


# -- bitsandbytes ------------------------------------------------------------------------------------------------------
def _four_bit(codec: str, columns: int, parts: Mapping[str, Tensor], rows: Rows) -> Tensor:
    from compress.codecs.nf4 import BLOCK

    data = parts["codes"][rows].to(torch.int32)
    values = _look_up(data, _level_table(codec, data.device)).reshape(len(data), -1, BLOCK)
    scales = _nested_scales(parts, rows) if "nested_absmax" in parts else parts["absmax"][rows]
    return values.mul_(scales[..., None]).reshape(len(data), columns)


def _nested_scales(parts: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Block scales of double quantization, float32 [k, blocks]: 256 of them share a scale, row after row."""
    from compress.codecs.nf4 import NESTED_BLOCK

    codes, nested = parts["absmax"], parts["nested_absmax"]
    starts = torch.arange(len(codes), device=codes.device)[rows] * codes.shape[1]
    place = (starts[:, None] + torch.arange(codes.shape[1], device=codes.device)) // NESTED_BLOCK
    return _dynamic_levels(codes.device)[codes[rows].long()] * nested[place] + parts["offset"]


@cache
def _dynamic_levels(device: torch.device) -> Tensor:
    from compress.codecs.nf4 import dynamic_map

    return dynamic_map().to(device)


@cache
def _level_table(codec: str, device: torch.device) -> Tensor:
    """Entry i: the levels of the two codes in byte i, the high half first; float32 [256, 2]."""
    octets = torch.arange(256, device=device)
    return get_codec(codec).table.to(device)[torch.stack((octets >> 4, octets & 0xF), dim=1)]


# -- vectors -----------------------------------------------------------------------------------------------------------
def _e8p(codec: str, columns: int, parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype) -> Tensor:
    """E8P in units of the rows' scales: one look-up for eight columns of a plane."""
    planes = [parts[name][rows] for name in ("codes", "residual") if name in parts]
    # sums of two planes are exact in half precision, but not in bfloat16
    exact = torch.bfloat16 if dtype == torch.bfloat16 and len(planes) == 1 else torch.float16
    tables = _e8p_tables(codec, planes[0].device, exact)
    first, *rest = (
        _look_up((plane.view(torch.uint16) if plane.dtype == torch.int16 else plane).to(torch.int32), table)
        for plane, table in zip(planes, tables, strict=True)
    )
    for values in rest:
        first += values
    return first.reshape(-1, columns).to(dtype)


@cache
def _e8p_tables(codec: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(table.contiguous() for table in get_codec(codec).tables(device, dtype))


def _trellis(codec: str, columns: int, parts: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """A trellis in units of the rows' scales: one look-up for two columns, by the bits that make both states."""
    from compress.codecs.trellis import TILE

    assert isinstance(rows, slice)
    coder = get_codec(codec)
    codes = parts["codes"][rows.start // TILE : rows.stop // TILE]
    high, wide = codes.shape[:2]
    # every byte with the two before it on the tile's circle, which hold all bits of the states that end in it
    octets = torch.cat((codes[..., -2:], codes), dim=-1).to(torch.int32)
    words = octets[..., 2:] | octets[..., 1:-1] << 8 | octets[..., :-2] << 16
    group = 3 if coder.bits == 3 else 1  # bytes after which pairs end at the same bits again
    words = words.reshape(high, wide, TILE, -1, group)
    pairs = 4 * group // coder.bits
    index = torch.empty((high, TILE, wide, TILE // 2 // pairs, pairs), dtype=torch.int32, device=codes.device)
    table = _trellis_pairs(codec, codes.device)
    for pair in range(pairs):
        octet, bit = divmod(2 * coder.bits * (pair + 1) - 1, 8)
        index[..., pair] = ((words[..., octet] >> (7 - bit)) & (len(table) - 1)).transpose(1, 2)
    return _look_up(index, table).reshape(-1, columns)


@cache
def _trellis_pairs(codec: str, device: torch.device) -> Tensor:
    """Entry i: the values of the two states within i, in half precision, which holds them; [2^(state_bits + bits), 2]."""
    coder = get_codec(codec)
    windows = torch.arange(1 << (coder.state_bits + coder.bits), device=device)
    states = torch.stack((windows >> coder.bits, windows & ((1 << coder.state_bits) - 1)), dim=1)
    return coder.table(device)[states].half()


def _look_up(index: Tensor, table: Tensor) -> Tensor:
    """table [m, v] at int32 index of any shape -> [index.numel(), v]."""
    width = table.shape[1] * table.element_size()
    whole = table.view(_OF_WIDTH[width]).reshape(-1)
    return whole.index_select(0, index.reshape(-1)).view(table.dtype).reshape(-1, table.shape[1])
