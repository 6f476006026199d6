"""The mixture of experts: a router, routed experts, shared experts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from compress.models.layers.base import Axis, GgufValue, Input, Slice, Sublayer, Weight
from compress.models.layers.mlp import Gated


@dataclass(frozen=True)
class Router:
    """How tokens choose their experts, and by what the experts' outputs are multiplied.

    name: its tensor, relative to the block; k: experts a token. score: of the logits; normalised: the chosen scores are
    divided by their sum; scale: then multiplied. correction: a bias added to the scores for the choice alone
    (DeepSeek-V3). groups, top_groups: experts are chosen from the best of equal groups, by `group_score`, the groups' largest
    score or the sum of its two largest.
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


@dataclass(frozen=True)
class SharedExpert:
    """A feed-forward that every token passes through beside the routed ones. gate: the tensor of its sigmoid gate."""

    prefix: str
    width: int
    gate: str | None = None


@dataclass(frozen=True)
class MoE(Sublayer):
    """Routed gated feed-forwards, the sum of the chosen ones weighted by the router, and shared ones.

    expert: prefix of an expert's tensors with `{e}`; leaves: of gate, up and down; fused: (gate and up, down) where
    checkpoints hold all experts in one tensor, [experts, 2 width, hidden] and [experts, hidden, width].
    """

    router: Router
    experts: int
    width: int
    expert: str = "mlp.experts.{e}."
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: SharedExpert | None = None
    fused: tuple[str, str] | None = None
    half: ClassVar[str] = "ffn"
    forward: ClassVar[str] = "moe"

    @property
    def sums_to_one(self) -> bool:
        """Whether a token's routing weights do."""
        return self.router.normalised and self.router.scale == 1.0

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
            up = f"{self.expert.format(e=e)}{self.leaves[1]}.weight"
            yield Input(
                f"experts.{e}.act",
                self.width,
                1,
                "ffn.act",
                "act",
                expert=e,
                pool=f"experts.{e}.act.pool",
                made_by=(up,),
            )
        if self.shared:
            up = f"{self.shared.prefix}up_proj.weight"
            yield Input("shared.act", self.shared.width, 1, "ffn.act", "act", made_by=(up,))

    def tensors(self) -> Iterator[Weight]:
        router, reads = self.router, self.reads
        yield Weight(
            router.name, (self.experts, self.hidden), "router", "ffn_gate_inp.weight", "router", reads=reads,
            axes=(Axis("experts"), None),
        )  # fmt: skip
        if router.correction:
            yield Weight(router.correction, (self.experts,), "biases", "exp_probs_b.bias", axes=(Axis("experts"),))
        parts = [list(self._expert(e)) for e in range(self.experts)]
        for part in range(3):  # all gates, all ups, all downs: as GGUF stacks them
            yield from (expert[part] for expert in parts)
        if self.shared:
            shared = Gated(
                self.shared.prefix, self.shared.width, "shared_experts", "ffn_{}_shexp", "shared",
                fused="the shared expert's gate and up",
            )  # fmt: skip
            yield from shared.weights(self)
            if self.shared.gate:
                yield Weight(
                    self.shared.gate, (1, self.hidden), "router", "ffn_gate_inp_shexp.weight", "router", reads=reads
                )

    def _expert(self, e: int) -> Iterator[Weight]:
        slices: list[tuple[Slice, ...]] = [()] * 3
        if self.fused:
            both, down = self.fused
            slices = [
                (Slice(both, e, 0, self.width),),
                (Slice(both, e, self.width, 2 * self.width),),
                (Slice(down, e),),
            ]
        expert = Gated(
            self.expert.format(e=e), self.width, "routed_experts", "ffn_{}_exps", f"experts.{e}", self.leaves,
            alone=self.sums_to_one and self.shared is None,
        )  # fmt: skip
        for weight, slice in zip(expert.weights(self, expert=e), slices, strict=True):
            yield replace(weight, slices=slice, fused="the routed experts of a layer")

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        keys: dict[str, GgufValue] = {
            "expert_count": self.experts,
            "expert_used_count": self.router.k,
            "expert_feed_forward_length": self.width,
        }
        if self.shared:
            keys["expert_shared_feed_forward_length"] = self.shared.width
        return keys
