"""Keys of config.json that families after DeepSeek-V2 share: dense first layers, experts in groups, shared experts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.limits import EXPERTS
from compress.models.config import Layers, Positive, Routed, Shared, one_a_layer

if TYPE_CHECKING:
    from compress.models.gguf.keys import Metadata

Groups = Annotated[int, Field(ge=1, le=EXPERTS)]


class Ranked(Routed):
    """Experts in groups of which the best may be chosen from, routing weights that are scaled; `grouped` says whether the groups
    count."""

    n_group: Groups = 1
    topk_group: Groups = 1
    routed_scaling_factor: Positive = 1.0

    @property
    def grouped(self) -> bool:
        return True

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.grouped:
            return
        if self.topk_group > self.n_group:
            yield f"topk_group: {self.topk_group} of the {self.n_group} groups of n_group cannot be chosen"
        elif self.experts % self.n_group:
            yield f"n_group: {self.experts} experts do not divide into {self.n_group} groups"


class Grouped(Ranked):
    """Dense first layers, experts in groups, shared experts (DeepSeek-V2 and after)."""

    first_k_dense_replace: Layers = 0
    n_shared_experts: Shared = 0

    GGUF: ClassVar[Mapping[str, str]] = {
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "routed_scaling_factor": "expert_weights_scale",
        "first_k_dense_replace": "leading_dense_block_count",
    }

    def is_sparse(self, layer: int) -> bool:
        return bool(self.experts) and layer >= self.first_k_dense_replace

    @property
    def leading(self) -> int:
        """Dense layers in front of the first with experts."""
        return next((layer for layer in range(self.layers) if self.is_sparse(layer)), self.layers)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        within = self.experts // self.n_group * self.topk_group
        sound = self.topk_group <= self.n_group and self.experts % self.n_group == 0
        if self.grouped and self.experts and sound and self.num_experts_per_tok > within:
            yield (
                f"num_experts_per_tok: the {self.topk_group} groups of topk_group have {within} experts, not "
                f"{self.num_experts_per_tok}"
            )


class Listed(Grouped):
    """A list may say which layers have experts, in place of first_k_dense_replace."""

    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None

    def is_sparse(self, layer: int) -> bool:
        kinds = self.mlp_layer_types
        return bool(self.experts) and kinds[layer] == "sparse" if kinds else super().is_sparse(layer)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.mlp_layer_types or None, self.layers, "mlp_layer_types")


def listed_in(m: Metadata) -> dict[str, Any]:
    """Which layers of a GGUF file are dense, by their tensors."""
    sparse = (f"blk.{layer}.ffn_gate_inp.weight" in m.names for layer in m.layers)
    return {"mlp_layer_types": ["sparse" if routed else "dense" for routed in sparse]}
