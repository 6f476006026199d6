"""Hunyuan 1, dense: per-head norms on queries and keys behind the positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Eps, EvenHeads
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class HunyuanConfig(EvenHeads):
    rms_norm_eps: Eps = 1e-5
    attention_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}

    @property
    def _alpha(self) -> float | None:
        """What theta is stretched by, for texts of any length: "dynamic" scaling in name alone."""
        found = self._rope().get("alpha")
        kind = self._rope().get("rope_type", self._rope().get("type"))
        return float(found) if found and kind == "dynamic" else None

    def _theta(self, kind: str = "") -> float:
        width = self.head_width
        return super()._theta(kind) * (self._alpha ** (width / (width - 2)) if self._alpha else 1.0)

    def _scaling(self, kind: str = "") -> Mapping[str, Any] | None:
        return None if self._alpha else super()._scaling(kind)


def mixer(c: HunyuanConfig) -> Sublayer:
    """Attention with norms behind the positions."""
    return attention(
        c,
        qk_norm="head",
        norm_after_rope=True,
        norms=("query_layernorm", "key_layernorm"),
        bias=c.attention_bias,
        output_bias=c.attention_bias,
    )


def block(c: HunyuanConfig, layer: int) -> Block:
    return mixer(c), mlp(c)


FAMILY = Family(
    model_types=("hunyuan_v1_dense",),
    hf_architecture="HunYuanDenseV1ForCausalLM",
    config=HunyuanConfig,
    gguf=Gguf("hunyuan-dense"),
    block=block,
)
