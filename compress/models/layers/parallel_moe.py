"""Routed experts beside a dense feed-forward, each between norms of its own, as Gemma 4 has them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from compress.models.layers.base import Axis, GgufValue, Input, Weight
from compress.models.layers.mlp import FeedForward
from compress.models.layers.moe import MoE, SharedExpert


@dataclass(frozen=True)
class ParallelMoE(MoE):
    """post_1(dense(pre_1(x))) + post_2(experts(pre_2(x))) of the stream x as it is; `shared` is the dense feed-forward.

    The router reads x / rms(x) times `scale` / sqrt(hidden); routing weights are multiplied by the chosen experts' `each`. pre,
    post: the norms of the dense feed-forward and of the experts, in checkpoints and in GGUF.
    """

    scale: str = "router.scale"
    each: str = "router.per_expert_scale"
    pre: tuple[tuple[str, str], ...] = (
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    )
    behind: tuple[tuple[str, str], ...] = (
        ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
        ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
    )
    forward: ClassVar[str] = "parallel_moe"

    @property
    def sums_to_one(self) -> bool:
        return False

    def inputs(self) -> Iterator[Input]:
        dense, routed = ((f"{norm}.weight",) for norm, _ in self.pre)
        for given in super().inputs():
            if given.key == "router":
                yield replace(given, made_by=())  # nothing but the router reads it
                yield Input("routed.in", self.hidden, 0, "ffn.in", "in", made_by=routed)
            elif given.key == "shared.in":
                yield replace(given, part_of=None, made_by=dense)
            elif given.part_of == "router":
                yield replace(given, part_of="routed.in", pool="routed.in")
            else:
                yield given

    def tensors(self) -> Iterator[Weight]:
        yield self._beside(self.scale, self.hidden, "norms", "ffn_gate_inp.scale")
        yield replace(self._beside(self.each, self.experts, "small", "ffn_down_exps.scale"), axes=(Axis("experts"),))
        for norm, gguf in (*self.pre, *self.behind):
            yield self._beside(f"{norm}.weight", self.hidden, "norms", f"{gguf}.weight")
        yield from super().tensors()

    def _beside(self, name: str, size: int, role: str, gguf: str) -> Weight:
        return Weight(name, (size,), role, gguf)

    def beside(self, shared: SharedExpert) -> FeedForward:
        return replace(super().beside(shared), gguf="ffn_{}", together="the dense feed-forward's gate and up")

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {k: v for k, v in super().gguf_keys().items() if k != "expert_shared_feed_forward_length"}
