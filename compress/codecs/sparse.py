"""Pruned matrices without their zeros: a mask, then the kept values of all rows in one run.

Names: `sparse-<values>` for masks of any shape, `<n>:<m>-<values>` where n of every m columns of a row stay; values are
`f32`, `f16`, `bf16` or an intN codec. Parts:

    mask    uint8 [R, b]. Any shape: a bit a column, the first in a byte's lowest bit. n:m: the number of each group's
            combination (in lexicographic order of the columns that stay), packed to the bits that C(m, n) takes: 3 for
            2:4 (hardware keeps 4), 7 for 4:8.
    values  float [kept]; or, of intN: codes uint8, the kept codes packed to their bits; scales float16 [R, groups] of all
            columns, pruned or not; zeros uint8 where the codec has zero points, packed row by row

Kept values may happen to be zero. Where a row's values start follows from the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from compress.codecs.base import Codec, Rows
from compress.codecs.lookup import codes as looked_up
from compress.codecs.names import CodecInfo, codec_info, mask_bits, packed_bytes
from compress.codecs.packing import pack_bits, unpack_bits, unpack_run
from compress.weights import Packed


class SparseCodec(Codec):
    """A mask and values in another codec."""

    kind = "sparse"

    def __init__(self, name: str):
        self.name, self._info = name, codec_info(name)
        self.values = codec_info(self.info.parts[0])

    @property
    def info(self) -> CodecInfo:
        return self._info

    def bits_per_weight(self, in_features: int) -> float:
        """Of an n:m codec; for masks of any shape with half of the weights kept."""
        kept = in_features * self.info.keep // self.info.of if self.info.of else in_features // 2
        return 8.0 * packed_bytes(self.name, (1, in_features), kept) / in_features

    def pack(self, inner: Packed, mask: Tensor) -> Packed:
        """inner: the matrix [R, n] in the codec of the values; mask: bool [R, n], True where a weight stays."""
        parts = {"mask": self._pack_mask(mask)}
        if self.values.is_float:
            parts["values"] = inner.parts["values"][mask]
        else:
            parts["codes"] = pack_bits(inner.parts["codes"][mask][None], self.info.bits)[0]
            parts["scales"] = inner.parts["scales"]
            if not self.info.symmetric:
                parts["zeros"] = pack_bits(inner.parts["zeros"], self.info.bits)
        return Packed(self.name, inner.shape, parts)

    def unpack(self, packed: Packed) -> Tensor:
        rows, columns = packed.shape
        starts = row_starts(self.name, packed.parts["mask"], columns)
        return self.rows(packed.parts, slice(0, rows), columns, starts)

    def rows(self, parts: Mapping[str, Tensor], rows: slice, columns: int, starts: Tensor) -> Tensor:
        """Some rows, float32 [k, columns]. starts: int64 [R + 1], see `row_starts`."""
        mask = self.mask(parts["mask"][rows], columns)
        first, last = int(starts[rows.start]), int(starts[rows.stop])
        out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        if self.values.is_float:
            return out.masked_scatter_(mask, parts["values"][first:last].float())
        codes = unpack_run(parts["codes"], self.info.bits, first, last).float()
        scales = parts["scales"][rows].float()
        groups = scales.shape[1]
        if self.info.symmetric:
            out.masked_scatter_(mask, codes - 2 ** (self.info.bits - 1))
        else:
            zeros = unpack_bits(parts["zeros"][rows], self.info.bits, groups).float()
            out.masked_scatter_(mask, codes)
            out -= zeros.repeat_interleave(columns // groups, 1) * mask
        return out.reshape(len(mask), groups, -1).mul_(scales[..., None]).reshape(mask.shape)

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec; rows: a slice, parts: also "starts", of `row_starts`, of which two numbers are read on the CPU.

        Every column looks up its value: where the values of its group of columns start, plus its place among those that
        stay there; all that do not look at a zero in front.
        """
        assert isinstance(rows, slice)
        info, columns = self.info, shape[1]
        first, last = parts["starts"][[rows.start, rows.stop]].tolist()
        if not info.bits:
            values = parts["values"][first:last].to(dtype)
        else:
            start = first // 8 * 8  # eight codes fill whole bytes
            run = parts["codes"][start * info.bits // 8 : -(-last * info.bits // 8)]
            middle = 2 ** (info.bits - 1) if info.symmetric else 0
            values = looked_up(run[None], info.bits, last - start, middle)[0, first - start :]
        index = _places(info, columns, parts["mask"][rows])
        out = torch.cat((values.new_zeros(1), values)).index_select(0, index).reshape(-1, columns)
        if not info.bits:
            return out, None
        scales = parts["scales"][rows].float()
        grouped = out.reshape(*scales.shape, -1)
        if not info.symmetric:
            zeros = looked_up(parts["zeros"][rows], info.bits, scales.shape[1])[..., None]
            grouped.sub_(zeros * (index > 0).reshape(grouped.shape))
        elif scales.shape[1] == 1:
            return out.to(dtype), scales
        return grouped.mul_(scales[..., None]).reshape(-1, columns).to(dtype), None

    # -- masks -----------------------------------------------------------------------------------------------------
    def mask(self, data: Tensor, columns: int) -> Tensor:
        """The mask of some rows, bool [k, columns], from its bytes."""
        if not self.info.of:
            return unpack_bits(data, 1, columns).bool()
        ranks = unpack_bits(data, mask_bits(self.name), columns // self.info.of)
        return combinations_table(self.info.keep, self.info.of, data.device)[ranks.long()].reshape(len(data), columns)

    def _pack_mask(self, mask: Tensor) -> Tensor:
        if not self.info.of:
            return pack_bits(mask.to(torch.uint8), 1)
        keep, of = self.info.keep, self.info.of
        groups = mask.reshape(len(mask), -1, of)
        weights = 1 << torch.arange(of, device=mask.device)
        table = (combinations_table(keep, of, mask.device).long() * weights).sum(1)
        order = table.argsort()
        wanted = (groups.long() * weights).sum(2)
        at = torch.searchsorted(table[order], wanted).clamp_max(len(table) - 1)
        if not torch.equal(table[order][at], wanted):
            raise ValueError(f"{self.name} keeps {keep} of every {of} columns; this mask does not")
        return pack_bits(order[at].to(torch.uint8), mask_bits(self.name))


def row_starts(codec: str, mask: Tensor, columns: int) -> Tensor:
    """Where each row's values start among all kept ones, int64 [R + 1]. mask: the part of that name."""
    info = codec_info(codec)
    if info.of:
        return torch.arange(len(mask) + 1, device=mask.device) * (columns // info.of * info.keep)
    counts = _ones(mask.device)[mask.long()].sum(1)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


@cache
def combinations_table(keep: int, of: int, device: torch.device) -> Tensor:
    """Every choice of `keep` of `of` columns, bool [combinations, of], in lexicographic order."""
    chosen = torch.tensor(list(combinations(range(of), keep)), device=device)
    return torch.zeros(len(chosen), of, dtype=torch.bool, device=device).scatter_(1, chosen, True)


@cache
def _ones(device: torch.device) -> Tensor:
    """Set bits of every byte."""
    octets = torch.arange(256, device=device)
    return ((octets[:, None] >> torch.arange(8, device=device)) & 1).sum(1)


def _places(info: CodecInfo, columns: int, mask: Tensor) -> Tensor:
    """One more than each column's place among all kept values of some rows, 0 where nothing is kept; int32 [k * columns].

    mask: their bytes.
    """
    count, table = _mask_table(info.keep, info.of, mask.device)
    if info.of:
        bits, many = mask_bits(info.name), columns // info.of
        numbers = looked_up(mask, bits, many) if bits in (2, 3, 4, 8) else unpack_bits(mask, bits, many)
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
