"""The gated short convolution (LFM2, arXiv 2511.23404). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress.models.layers.base import GgufValue, Input, Past, Sublayer, Weight, linear
from compress.models.layers.views import Piece


@dataclass(frozen=True)
class ShortConv(Sublayer):
    """out_proj(C * conv(B * x)): in_proj's rows are B, C and x, `hidden` each; the convolution is causal, one kernel a channel.

    kernel: tokens it spans; bias: on the convolution and both projections; prefix: of its tensors in the block.
    """

    kernel: int
    bias: bool = False
    prefix: str = "conv."
    half: ClassVar[str] = "attention"
    forward: ClassVar[str] = "short_conv"

    def inputs(self) -> Iterator[Input]:
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=self.made_by)
        conv = f"{self.prefix}conv.weight", *((f"{self.prefix}conv.bias",) if self.bias else ())
        yield Input("attention.out", self.hidden, 1, "attention.out", "out", made_by=conv)

    def tensors(self) -> Iterator[Weight]:
        p, h = self.prefix, self.hidden
        yield from linear(
            f"{p}in_proj", 3 * h, h, "attention.qkv", "shortconv.in_proj", "attention.in", self.bias, reads=self.reads
        )
        kernels = Piece("shortconv.conv.weight", shape=(h, self.kernel))
        yield Weight(f"{p}conv.weight", (h, 1, self.kernel), "small", "shortconv.conv.weight", pieces=(kernels,))
        if self.bias:
            yield Weight(f"{p}conv.bias", (h,), "biases", "shortconv.conv.bias")
        yield from linear(
            f"{p}out_proj",
            h,
            h,
            "attention.o",
            "shortconv.out_proj",
            "attention.out",
            self.bias,
            writes=True,
            alone=True,
        )

    def past(self) -> Past:
        return Past(state=(self.kernel - 1) * self.hidden)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {"shortconv.l_cache": self.kernel}
