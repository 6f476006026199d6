"""The feed-forward: gated (SwiGLU, arXiv 2002.05202) or not, with what stands between its linears as an option. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from compress.models.layers.base import Axis, GgufValue, Input, Slice, Sublayer, Weight, linear
from compress.models.layers.views import Gathered, Piece

LEAVES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Activation:
    """What stands between the linears of a feed-forward: f(gate) (up + offset), or f(up) where there is no gate.

    function: silu is x sigmoid(slope x); gelu_tanh its neighbour by tanh (arXiv 1606.08415); relu2 is max(x, 0)^2 (2109.08668).
    limit: gate is at most that, and up no farther from 0, before anything else; None for no limit (gpt-oss).
    """

    function: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    slope: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    @property
    def linear(self) -> bool:
        """Whether the product is linear in up, so that a scale of up's rows is one of the product's channels."""
        return self.limit is None and self.offset == 0.0

    @property
    def name(self) -> str:
        """In words, for messages."""
        limited = "" if self.limit is None else f" of inputs within {self.limit:g}"
        return f"{self.function}{limited}{f' with up + {self.offset:g}' if self.offset else ''}"


SILU, GELU_TANH, RELU2 = Activation(), Activation("gelu_tanh"), Activation("relu2")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "relu2": RELU2,
}  # fmt: skip
"""By the names that config.json has for them."""


@dataclass(frozen=True)
class Fused:
    """Tensors of a checkpoint that hold gate and up together, gate first, and those of all routed experts of a layer.

    both, down: their names, [2 width, hidden] and [hidden, width], of experts [experts, ...]; transposed: [.., in, out];
    interleaved: gate and up take turns; biases: names of their biases; only: transformers reads no other form. down is "" where
    it is stored by itself.
    """

    both: str
    down: str = ""
    transposed: bool = False
    interleaved: bool = False
    biases: tuple[str, str] | None = None
    only: bool = False

    def slices(self, width: int, gated: bool, index: int | None = None) -> Iterator[tuple[Slice, ...]]:
        """Of every linear's weight, and behind it of its bias where there are some: gate, where there is one, up and down."""
        for part in range(2 if gated else 1):
            start, stop, step = (part, None, 2) if self.interleaved else (part * width, (part + 1) * width, 1)
            if not gated:
                start, stop, step = 0, None, 1
            yield (Slice(self.both, index, start, stop, self.transposed, step),)
            if self.biases:
                yield (Slice(self.biases[0], index, start, stop, step=step),)
        yield (Slice(self.down, index, transposed=self.transposed),) if self.down else ()
        if self.biases:
            yield (Slice(self.biases[1], index),)


@dataclass(frozen=True)
class FeedForward:
    """The matrices of one feed-forward, `width` channels wide, whose inputs are `{key}.in` and `{key}.act`.

    prefix, leaves: their names, without a gate where there are two; gguf: with `{}` for gate, up and down; together, alone: as
    `Weight.fused` and `Weight.alone`; joined: the one tensor of gate and up; parted: which GGUF has as two; fused: where checkpoints
    hold them.
    """

    prefix: str
    width: int
    role: str
    gguf: str
    key: str
    leaves: tuple[str, ...] = LEAVES
    bias: bool = False
    together: str | None = None
    alone: bool = False
    activation: Activation = SILU
    joined: str = ""
    fused: Fused | None = None
    index: int | None = None
    parted: bool = False

    @property
    def gated(self) -> bool:
        return len(self.leaves) == 3

    @property
    def made_by(self) -> tuple[str, ...]:
        """What a scale on the channels of `{key}.act` may be folded into."""
        up = self.prefix + self.leaves[-2]
        if not (self.gated and self.activation.linear) or self.joined:
            return ()
        return (f"{up}.weight", *((f"{up}.bias",) if self.bias else ()))

    def weights(self, layer: Sublayer, **facts: Any) -> Iterator[Weight]:
        """gate, up and down as tensors of a sub-layer."""
        found = self._weights(layer, **facts)
        if self.fused is None:
            yield from found
            return
        slices = self.fused.slices(self.width, self.gated, self.index)
        for weight, where in zip(found, slices, strict=True):
            yield replace(weight, slices=where, stacked=self.fused.only and bool(where))

    def _weights(self, layer: Sublayer, **facts: Any) -> Iterator[Weight]:
        reads, channels = layer.reads, Axis(self.key)
        *gates, up, down = (self.prefix + leaf for leaf in self.leaves)
        parts = [*(("gate", name, self.width) for name in gates), ("up", up, self.width)]
        if self.joined:
            parts = [("up", self.prefix + self.joined, 2 * self.width)]
        for part, name, rows in parts:
            yield from linear(
                name, rows, layer.hidden, f"{self.role}.{part}", self.gguf.format(part), f"{self.key}.in", self.bias,
                reads=reads, axes=() if self.joined else (channels, None), fused=self.together, pieces=self._pieces, **facts,
            )  # fmt: skip
        yield from linear(
            down, layer.hidden, self.width, f"{self.role}.down", self.gguf.format("down"), f"{self.key}.act", self.bias,
            writes=True, alone=self.alone, axes=(None, None if self.joined else channels), **facts,
        )  # fmt: skip

    @property
    def _pieces(self) -> tuple[Piece, ...]:
        if not self.parted:
            return ()
        halves = (self.width, self.width)
        return tuple(
            Piece(f"{self.gguf.format(part)}.weight", Gathered(1, halves, (n,)))
            for n, part in enumerate(("gate", "up"))
        )


@dataclass(frozen=True)
class Mlp(Sublayer):
    """down(f(gate x) * up x), or down(f(up x)), `width` channels.

    prefix, leaves: names of gate, up and down, or of up and down alone; joined: the tensor [2 width, hidden] that holds
    gate and up, which stays one, parted: but in GGUF; fused: the tensors of a checkpoint that they are parts of.
    """

    width: int
    bias: bool = False
    prefix: str = "mlp."
    leaves: tuple[str, ...] = LEAVES
    activation: Activation = SILU
    joined: str = ""
    parted: bool = False
    fused: Fused | None = None
    half: ClassVar[str] = "ffn"
    forward: ClassVar[str] = "mlp"

    @property
    def feed_forward(self) -> FeedForward:
        return FeedForward(
            self.prefix, self.width, "mlp", "ffn_{}", "mlp", self.leaves, self.bias,
            "gate and up" if len(self.leaves) == 3 and not self.joined else None, True, self.activation, self.joined, self.fused,
            parted=self.parted,
        )  # fmt: skip

    def inputs(self) -> Iterator[Input]:
        yield Input("mlp.in", self.hidden, 0, "ffn.in", "in", made_by=self.made_by)
        yield Input("mlp.act", self.width, 1, "ffn.act", "act", made_by=self.feed_forward.made_by)

    def tensors(self) -> Iterator[Weight]:
        yield from self.feed_forward.weights(self)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {"feed_forward_length": self.width}
