"""The gated feed-forward (SwiGLU, arXiv 2002.05202). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compress.models.layers.base import Axis, GgufValue, Input, Sublayer, Weight, linear


@dataclass(frozen=True)
class Mlp(Sublayer):
    """down(silu(gate x) * up x), `width` channels."""

    width: int
    bias: bool = False
    half: ClassVar[str] = "ffn"
    forward: ClassVar[str] = "mlp"

    def inputs(self) -> Iterator[Input]:
        yield Input("mlp.in", self.hidden, 0, "ffn.in", "in", made_by=(f"{self.norm}.weight",))
        made_by = ("mlp.up_proj.weight", *(("mlp.up_proj.bias",) if self.bias else ()))
        yield Input("mlp.act", self.width, 1, "ffn.act", "act", made_by=made_by)

    def tensors(self) -> Iterator[Weight]:
        yield from gated(
            self, "mlp.", ("gate_proj", "up_proj", "down_proj"), self.width, "mlp", "ffn_{}", "mlp",
            bias=self.bias, fused="gate and up", alone=True,
        )  # fmt: skip

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {"feed_forward_length": self.width}


def gated(
    layer: Sublayer,
    prefix: str,
    leaves: tuple[str, str, str],
    width: int,
    role: str,
    gguf: str,
    key: str,
    *,
    bias: bool = False,
    fused: str = "",
    alone: bool = False,
    **facts: Any,
) -> Iterator[Weight]:
    """gate, up and down of one gated feed-forward, whose inputs are `{key}.in` and `{key}.act`."""
    reads, channels = f"{layer.norm}.weight", Axis(key)
    for part, leaf in zip(("gate", "up"), leaves[:2], strict=True):
        yield from linear(
            prefix + leaf, width, layer.hidden, f"{role}.{part}", gguf.format(part), f"{key}.in", bias, reads=reads,
            axes=(channels, None), fused=fused, **facts,
        )  # fmt: skip
    yield from linear(
        prefix + leaves[2], layer.hidden, width, f"{role}.down", gguf.format("down"), f"{key}.act", bias, writes=True,
        alone=alone, axes=(None, channels), **facts,
    )  # fmt: skip
