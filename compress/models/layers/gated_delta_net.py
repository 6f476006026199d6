"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) as Qwen3-Next and Qwen3.5 have it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress.models.layers.base import GgufValue, Input, Past, Weight, linear
from compress.models.layers.hosted import Hosted
from compress.models.layers.views import Gathered, Map, Order, Piece, Tiled


@dataclass(frozen=True)
class GatedDeltaNet(Hosted):
    """Linear attention with a decaying state; key and value heads of `head_dim` channels.

    joined: checkpoints hold the projections as in_proj_qkvz and in_proj_ba, key head by key head (Qwen3-Next), else as
    in_proj_qkv, z, b and a, for which GGUF orders the value heads in turns over the key heads (Qwen3.5).
    """

    key_heads: int = 0
    value_heads: int = 0
    head_dim: int = 0
    kernel: int = 4
    joined: bool = False

    @property
    def linears(self) -> Mapping[str, str]:
        return {("in_proj_qkvz" if self.joined else "in_proj_qkv"): "attention.in", "out_proj": "attention.out"}

    @property
    def _keys(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def _values(self) -> int:
        return self.value_heads * self.head_dim

    def inputs(self) -> Iterator[Input]:
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=self.made_by)
        norm = (f"{self.prefix}norm.weight",)  # one weight a channel of a head, shared by all heads
        yield Input(
            "attention.out",
            self._values,
            1,
            "attention.out",
            "out",
            made_by=norm,
            heads=self.value_heads,
            head_dim=self.head_dim,
        )

    def tensors(self) -> Iterator[Weight]:
        p, h, v, d = self.prefix, self.hidden, self.value_heads, self.head_dim
        channels = 2 * self._keys + self._values
        yield from self._joined() if self.joined else self._split()
        conv = Piece("ssm_conv1d.weight", self._tiled(d, 2 * self._keys), shape=(channels, self.kernel))
        yield Weight(f"{p}conv1d.weight", (channels, 1, self.kernel), "small", "ssm_conv1d.weight", pieces=(conv,))
        yield Weight(f"{p}dt_bias", (v,), "small", "ssm_dt.bias", pieces=(Piece("ssm_dt.bias", self._tiled()),))
        decay = Piece("ssm_a", self._tiled(), map=Map("decay"))
        yield Weight(f"{p}A_log", (v,), "small", "ssm_a", pieces=(decay,))
        yield Weight(f"{p}norm.weight", (d,), "norms", "ssm_norm.weight")
        out = Piece("ssm_out.weight", columns=self._tiled(d))
        yield from linear(
            f"{p}out_proj", h, self._values, "attention.o", "ssm_out", "attention.out", writes=True, alone=True,
            pieces=() if out.columns is None else (out,),
        )  # fmt: skip

    def _joined(self) -> Iterator[Weight]:
        each = self.value_heads // self.key_heads * self.head_dim
        sizes = (self.head_dim, self.head_dim, each, each)  # q, k, v and z of a key head
        pieces = (
            Piece("attn_qkv.weight", Gathered(self.key_heads, sizes, (0, 1, 2))),
            Piece("attn_gate.weight", Gathered(self.key_heads, sizes, (3,))),
        )
        yield from self._in("in_proj_qkvz", 2 * (self._keys + self._values), "attention.qkv", "attn_qkv", pieces=pieces)
        yield from self._in("in_proj_ba", 2 * self.value_heads, "small", "ssm_ba")

    def _split(self) -> Iterator[Weight]:
        d, v, keys = self.head_dim, self.value_heads, 2 * self._keys
        for leaf, rows, role, gguf, order in (
            ("in_proj_qkv", keys + self._values, "attention.qkv", "attn_qkv", self._tiled(d, keys)),
            ("in_proj_z", self._values, "attention.gate", "attn_gate", self._tiled(d)),
            ("in_proj_b", v, "small", "ssm_beta", self._tiled()),
            ("in_proj_a", v, "small", "ssm_alpha", self._tiled()),
        ):
            yield from self._in(leaf, rows, role, gguf, pieces=(Piece(f"{gguf}.weight", order),))

    def _in(self, leaf: str, rows: int, role: str, gguf: str, **facts: Any) -> Iterator[Weight]:
        reads, fused = self.reads, "the projections of a linear attention" if role != "small" else None
        yield from linear(
            self.prefix + leaf, rows, self.hidden, role, gguf, "attention.in", reads=reads, fused=fused, **facts
        )

    def _tiled(self, run: int = 1, start: int = 0) -> Order | None:
        """GGUF's order of what belongs to value heads."""
        each = self.value_heads // self.key_heads
        return None if self.joined or each == 1 else Tiled(self.key_heads, each, run, start)

    def past(self) -> Past:
        convolved = (self.kernel - 1) * (2 * self._keys + self._values)
        return Past(state=self._values * self.head_dim + convolved)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            "ssm.conv_kernel": self.kernel,
            "ssm.state_size": self.head_dim,
            "ssm.group_count": self.key_heads,
            "ssm.time_step_rank": self.value_heads,
            "ssm.inner_size": self._values,
        }
