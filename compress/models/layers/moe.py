"""The mixture of experts: a router, routed experts, shared experts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from compress.models.layers.base import Axis, GgufValue, Input, Sublayer, Weight, linear
from compress.models.layers.mlp import LEAVES, SILU, Activation, FeedForward, Fused
from compress.models.layers.views import Piece


@dataclass(frozen=True)
class Router:
    """How tokens choose their experts, and by what the experts' outputs are multiplied.

    name: its tensor, relative to the block; k: experts a token; bias: added to the logits. score: of the logits; normalised:
    the chosen scores are divided by their sum; scale: then multiplied. A softmax over the chosen logits alone is a softmax over
    all, normalised. correction: a bias added to the scores for the choice alone (DeepSeek-V3), stored as a row [1, experts]
    where `correction_row`; correction_gguf: what GGUF calls it. groups, top_groups: experts are chosen from the best of equal
    groups, by `group_score`, the groups' largest score or the sum of its two largest. at_input: what an expert reads is
    multiplied, not what it gives (Llama 4), so that its linears have no biases.
    """

    name: str
    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    correction: str | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    correction_row: bool = False
    correction_gguf: str = "exp_probs_b.bias"
    at_input: bool = False

    @property
    def sums_to_one(self) -> bool:
        """Whether what a token's experts give is averaged, with weights whose sum is one."""
        return self.normalised and self.scale == 1.0 and not self.at_input


@dataclass(frozen=True)
class SharedExpert:
    """A feed-forward that every token passes through beside the routed ones. gate: the tensor of its sigmoid gate; leaves,
    joined, parted: as `FeedForward` has them; fused: the tensors of a checkpoint that its matrices are parts of."""

    prefix: str
    width: int
    gate: str | None = None
    leaves: tuple[str, ...] = LEAVES
    fused: Fused | None = None
    joined: str = ""
    parted: bool = False


@dataclass(frozen=True)
class MoE(Sublayer):
    """Routed feed-forwards, the sum of the chosen ones weighted by the router, and shared ones.

    expert: prefix of an expert's tensors with `{e}`; leaves: of gate, up and down, or of up and down alone; activation: of routed
    and shared ones; bias: of the routed ones' linears; fused: the tensors of a checkpoint that hold all routed experts.
    """

    router: Router
    experts: int
    width: int
    expert: str = "mlp.experts.{e}."
    leaves: tuple[str, ...] = LEAVES
    shared: SharedExpert | None = None
    fused: Fused | None = None
    activation: Activation = SILU
    bias: bool = False
    half: ClassVar[str] = "ffn"
    forward: ClassVar[str] = "moe"

    @property
    def sums_to_one(self) -> bool:
        """Whether a token's routing weights do."""
        return self.router.sums_to_one

    def inputs(self) -> Iterator[Input]:
        norm = self.made_by
        yield Input("router", self.hidden, 0, "ffn.in", "router", made_by=norm)
        for e in range(self.experts):
            yield Input(
                f"experts.{e}.in",
                self.hidden,
                0,
                "ffn.in",
                "in",
                expert=e,
                pool="router",
                part_of="router",
                counts=True,
            )
        if self.shared:
            yield Input("shared.in", self.hidden, 0, "ffn.in", "in", part_of="router")
        for e in range(self.experts):
            yield Input(
                f"experts.{e}.act",
                self.width,
                1,
                "ffn.act",
                "act",
                expert=e,
                pool=f"experts.{e}.act.pool",
                made_by=self.routed(e).made_by,
            )
        if self.shared:
            shared = self.beside(self.shared)
            yield Input("shared.act", self.shared.width, 1, "ffn.act", "act", made_by=shared.made_by)

    def tensors(self) -> Iterator[Weight]:
        router, reads = self.router, self.reads
        yield from linear(
            router.name.removesuffix(".weight"), self.experts, self.hidden, "router", "ffn_gate_inp", "router", router.bias,
            reads=reads, axes=(Axis("experts"), None),
        )  # fmt: skip
        if router.correction:
            yield self._correction(router.correction)
        for same in zip(*(self.routed(e).weights(self, expert=e) for e in range(self.experts)), strict=True):
            for weight in same:  # all gates, all ups, all downs: as GGUF stacks them
                yield weight if weight.input is None else replace(weight, fused="the routed experts of a layer")
        if self.shared:
            yield from self.beside(self.shared).weights(self)
            if self.shared.gate:
                yield Weight(
                    self.shared.gate, (1, self.hidden), "router", "ffn_gate_inp_shexp.weight", "router", reads=reads
                )

    def _correction(self, name: str) -> Weight:
        gguf, each = self.router.correction_gguf, (Axis("experts"),)
        if not self.router.correction_row:
            return Weight(name, (self.experts,), "biases", gguf, axes=each)
        pieces = (Piece(gguf, shape=(self.experts,)),)
        return Weight(name, (1, self.experts), "biases", gguf, axes=(None, *each), pieces=pieces)

    def routed(self, e: int) -> FeedForward:
        """One routed expert."""
        return FeedForward(
            self.expert.format(e=e), self.width, "routed_experts", "ffn_{}_exps", f"experts.{e}", self.leaves, self.bias,
            alone=self.sums_to_one and self.shared is None, activation=self.activation, fused=self.fused, index=e,
        )  # fmt: skip

    def beside(self, shared: SharedExpert) -> FeedForward:
        """The shared expert."""
        return FeedForward(
            shared.prefix, shared.width, "shared_experts", "ffn_{}_shexp", "shared", shared.leaves,
            together=None if shared.joined else "the shared expert's gate and up", activation=self.activation,
            fused=shared.fused, joined=shared.joined, parted=shared.parted,
        )  # fmt: skip

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        keys: dict[str, GgufValue] = {
            "expert_count": self.experts,
            "expert_used_count": self.router.k,
            "expert_feed_forward_length": self.width,
        }
        if self.shared:
            keys["expert_shared_feed_forward_length"] = self.shared.width
        return keys
