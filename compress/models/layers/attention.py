"""Multi-head attention with grouped keys and values (MHA, GQA, MQA), with its variants as options. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

from compress.models.layers.base import Axis, GgufValue, Input, Past, Sublayer, Weight, linear, shifted
from compress.models.layers.rope import Rope
from compress.models.layers.views import PairedHalves, Piece

QkNorm = Literal["", "head", "heads", "bare"]
NORMED_TOGETHER = "queries and keys are normed over all heads at once"
"""Why heads of a family with norms on all of them cannot be pruned: what stays would be divided by something else."""


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position p: times 1 + scale ln(1 + floor((p + first) / every)) (Llama 4, Ministral 3)."""

    scale: float
    every: int
    first: int = 0


@dataclass(frozen=True)
class Attention(Sublayer):
    """Grouped-query attention, causal, with rotary positions.

    rope: None for none. qk_norm: RMSNorm on queries and keys, on each "head" with the same weights, on each without ("bare") or
    on all "heads" at once; norm_after_rope: it comes behind the positions; bias: on q, k and v; output_bias: on o; gate: q_proj
    gives [query | gate] a head, and o_proj reads the heads times sigmoid(gate); gating: the linear that gives such a gate by
    itself, "" for none; value_dim: of value heads, None for head_dim; value_scale: what values are multiplied by; window:
    tokens that a token sees, None for all; chunk: a token sees the tokens of its own run of so many, None for all; scale: of
    the scores, None for 1 / sqrt(head_dim); softcap: scores s become softcap tanh(s / softcap), 0 for none; sinks: the tensor
    [heads] of scores that take part in the softmax and weigh nothing, "" for none; interleaved: neighbouring channels turn
    together, not those of two halves; paired: GGUF rotates neighbouring pairs where the checkpoint rotates halves, so that it
    orders the rows of q and k otherwise. value_norm: values, too, are divided by their root mean square, head by head;
    keys_are_values: before norm and positions, there is no v. joined: the tensor that holds q, k and v in a row, "" for three.
    prefix, leaves, norms: names of the tensors of q, k, v and o, and of the norms of q and k.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    eps: float
    qk_norm: QkNorm = ""
    bias: bool = False
    output_bias: bool = False
    gate: bool = False
    window: int | None = None
    paired: bool = False
    norm_after_rope: bool = False
    chunk: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    temperature: Temperature | None = None
    sinks: str = ""
    interleaved: bool = False
    value_norm: bool = False
    keys_are_values: bool = False
    joined: str = ""
    prefix: str = "self_attn."
    leaves: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, str] = ("q_norm", "k_norm")
    gating: str = ""
    value_dim: int | None = None
    value_scale: float = 1.0
    half: ClassVar[str] = "attention"
    forward: ClassVar[str] = "attention"

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of q, its gate not counted, k and v."""
        return (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_width)

    @property
    def value_width(self) -> int:
        """Of a value head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    def inputs(self) -> Iterator[Input]:
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=self.made_by)
        values = self.prefix + self.leaves[2]
        made_by = (f"{values}.weight", *((f"{values}.bias",) if self.bias else ()))
        yield Input(
            "attention.out",
            self.heads * self.value_width,
            1,
            "attention.out",
            "out",
            made_by=() if self.joined or self.value_norm or self.keys_are_values else made_by,
            heads=self.heads // self.kv_heads,
            head_dim=self.value_width,
        )

    def tensors(self) -> Iterator[Weight]:
        h, hd, vd, queries = self.hidden, self.head_dim, self.value_width, self.heads // self.kv_heads
        # a gate of their own, other rows beside them or positions keep channels apart
        turned = not (self.gate or self.gating or self.joined or self.keys_are_values) and vd == hd
        yield from self._joined() if self.joined else self._split(turned)
        axis = None if self.joined else Axis("kv_heads", queries * vd)
        if self.gating:
            yield from linear(
                self.prefix + self.gating, self.heads * vd, h, "attention.gate", "attn_gate", "attention.in",
                reads=self.reads, axes=(axis, None),
            )  # fmt: skip
        yield from linear(
            self.prefix + self.leaves[3], h, self.heads * vd, "attention.o", "attn_output", "attention.out", self.output_bias,
            writes=True, alone=True, axes=(None, axis), values=-1 if turned else None,
        )  # fmt: skip
        if self.qk_norm in ("head", "heads"):
            over = {"head": (1, 1), "heads": (self.heads, self.kv_heads)}[self.qk_norm]
            for leaf, name, count in zip("qk", self.norms, over, strict=True):
                gguf, shift = f"attn_{leaf}_norm.weight", self.norm_shift
                shape, pieces = (count * hd,), shifted(gguf, shift)
                yield Weight(f"{self.prefix}{name}.weight", shape, "norms", gguf, shift=shift, pieces=pieces)
        if self.sinks:
            yield Weight(
                self.prefix + self.sinks, (self.heads,), "small", "attn_sinks.weight", axes=(Axis("kv_heads", queries),)
            )

    def _split(self, turned: bool) -> Iterator[Weight]:
        hd, queries = self.head_dim, self.heads // self.kv_heads
        wide = hd * (2 if self.gate else 1)
        shared = Axis("kv_heads", hd)
        for leaf, name, rows, heads, axis in (
            ("q", self.leaves[0], self.heads * wide, self.heads, Axis("kv_heads", queries * wide)),
            ("k", self.leaves[1], self.kv_heads * hd, self.kv_heads, shared),
            ("v", self.leaves[2], self.kv_heads * self.value_width, 0, Axis("kv_heads", self.value_width)),
        ):
            if leaf == "v" and self.keys_are_values:
                continue
            pieces = (Piece(f"attn_{leaf}.weight", PairedHalves(heads)),) if self.paired and heads else ()
            yield from linear(
                self.prefix + name, rows, self.hidden, f"attention.{leaf}", f"attn_{leaf}", "attention.in", self.bias,
                reads=self.reads, fused="q, k and v", axes=(axis, None),
                values=0 if leaf == "v" and turned else None, pieces=pieces,
            )  # fmt: skip

    def _joined(self) -> Iterator[Weight]:
        yield from linear(
            self.prefix + self.joined, sum(self.rows), self.hidden, "attention.qkv", "attn_qkv", "attention.in", self.bias,
            reads=self.reads,
        )  # fmt: skip

    def past(self) -> Past:
        seen = min((size for size in (self.window, self.chunk) if size is not None), default=None)
        row = gcd(self.head_dim, self.value_width)
        return Past(token=self.kv_heads * (self.head_dim + self.value_width), row=row, window=seen)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.value_width,
            "attention.layer_norm_rms_epsilon": self.eps,
            **(self.rope.gguf_keys() if self.rope else {}),
        }
