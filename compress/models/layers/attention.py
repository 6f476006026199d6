"""Multi-head attention with grouped keys and values (MHA, GQA, MQA), with its variants as options. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress.models.layers.base import Axis, GgufValue, Input, Past, Sublayer, Weight, linear, shifted
from compress.models.layers.rope import Rope
from compress.models.layers.views import PairedHalves, Piece


@dataclass(frozen=True)
class Attention(Sublayer):
    """Grouped-query attention, causal, with rotary positions.

    qk_norm: RMSNorm on each query and key head before RoPE; bias: on q, k and v; output_bias: on o; gate: q_proj gives
    [query | gate] a head, and o_proj reads the heads times sigmoid(gate); window: tokens that a token sees, None for all;
    paired: GGUF rotates neighbouring pairs, so that it orders the rows of q and k otherwise.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    eps: float
    qk_norm: bool = False
    bias: bool = False
    output_bias: bool = False
    gate: bool = False
    window: int | None = None
    paired: bool = False
    half: ClassVar[str] = "attention"
    forward: ClassVar[str] = "attention"

    def inputs(self) -> Iterator[Input]:
        made_by = ("self_attn.v_proj.weight", *(("self_attn.v_proj.bias",) if self.bias else ()))
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=(f"{self.norm}.weight",))
        width = self.heads * self.head_dim
        yield Input(
            "attention.out", width, 1, "attention.out", "out", made_by=made_by, heads=self.heads // self.kv_heads, head_dim=self.head_dim
        )  # fmt: skip

    def tensors(self) -> Iterator[Weight]:
        h, hd, queries = self.hidden, self.head_dim, self.heads // self.kv_heads
        reads = {"reads": f"{self.norm}.weight", "fused": "q, k and v"}
        wide = hd * (2 if self.gate else 1)
        own, shared = Axis("kv_heads", queries * hd), Axis("kv_heads", hd)
        turned = not self.gate  # a gate of their own keeps channels apart
        for leaf, rows, heads, axis in (
            ("q", self.heads * wide, self.heads, Axis("kv_heads", queries * wide)),
            ("k", self.kv_heads * hd, self.kv_heads, shared),
            ("v", self.kv_heads * hd, 0, shared),
        ):
            pieces = (Piece(f"attn_{leaf}.weight", PairedHalves(heads)),) if self.paired and heads else ()
            yield from linear(
                f"self_attn.{leaf}_proj", rows, h, f"attention.{leaf}", f"attn_{leaf}", "attention.in", self.bias, **reads,
                axes=(axis, None), values=0 if leaf == "v" and turned else None, pieces=pieces,
            )  # fmt: skip
        yield from linear(
            "self_attn.o_proj", h, self.heads * hd, "attention.o", "attn_output", "attention.out", self.output_bias,
            writes=True, alone=True, axes=(None, own), values=-1 if turned else None,
        )  # fmt: skip
        if self.qk_norm:
            for leaf in "qk":
                gguf = f"attn_{leaf}_norm.weight"
                shift = self.norm_shift
                yield Weight(
                    f"self_attn.{leaf}_norm.weight", (hd,), "norms", gguf, shift=shift, pieces=shifted(gguf, shift)
                )

    def past(self) -> Past:
        return Past(token=2 * self.kv_heads * self.head_dim, row=self.head_dim, window=self.window)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.eps,
            **self.rope.gguf_keys(),
        }
