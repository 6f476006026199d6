"""The gated feed-forward (SwiGLU, arXiv 2002.05202). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compress.models.layers.base import Axis, GgufValue, Input, Sublayer, Weight, linear


@dataclass(frozen=True)
class Mlp(Sublayer):
    """down(silu(gate x) * up x), `width` channels. prefix, leaves: names of gate, up and down."""

    width: int
    bias: bool = False
    prefix: str = "mlp."
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    half: ClassVar[str] = "ffn"
    forward: ClassVar[str] = "mlp"

    def inputs(self) -> Iterator[Input]:
        yield Input("mlp.in", self.hidden, 0, "ffn.in", "in", made_by=self.made_by)
        up = self.prefix + self.leaves[1]
        made_by = (f"{up}.weight", *((f"{up}.bias",) if self.bias else ()))
        yield Input("mlp.act", self.width, 1, "ffn.act", "act", made_by=made_by)

    def tensors(self) -> Iterator[Weight]:
        mlp = Gated(
            self.prefix,
            self.width,
            "mlp",
            "ffn_{}",
            "mlp",
            self.leaves,
            bias=self.bias,
            fused="gate and up",
            alone=True,
        )
        yield from mlp.weights(self)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {"feed_forward_length": self.width}


@dataclass(frozen=True)
class Gated:
    """The three matrices of one gated feed-forward, `width` channels wide, whose inputs are `{key}.in` and `{key}.act`.

    prefix, leaves: their names; gguf: with `{}` for gate, up and down; fused, alone: as `Weight` has them.
    """

    prefix: str
    width: int
    role: str
    gguf: str
    key: str
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: bool = False
    fused: str = ""
    alone: bool = False

    def weights(self, layer: Sublayer, **facts: Any) -> Iterator[Weight]:
        """gate, up and down as tensors of a sub-layer."""
        reads, channels = layer.reads, Axis(self.key)
        gate, up, down = (self.prefix + leaf for leaf in self.leaves)
        for part, name in (("gate", gate), ("up", up)):
            yield from linear(
                name, self.width, layer.hidden, f"{self.role}.{part}", self.gguf.format(part), f"{self.key}.in", self.bias,
                reads=reads, axes=(channels, None), fused=self.fused, **facts,
            )  # fmt: skip
        yield from linear(
            down, layer.hidden, self.width, f"{self.role}.down", self.gguf.format("down"), f"{self.key}.act", self.bias,
            writes=True, alone=self.alone, axes=(None, channels), **facts,
        )  # fmt: skip
