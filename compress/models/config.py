"""config.json as families read it: defaults filled in, the common facts parsed. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from compress.errors import UnsupportedModel
from compress.models.layers.rope import Rope


class Config:
    """A model's configuration over its family's defaults."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.given, self.defaults = given, defaults
        self._values = {**defaults, **{k: v for k, v in given.items() if v is not None}}

    def get(self, key: str, default: Any = None) -> Any:
        """A value that is not null, the family's default, or `default`."""
        return self._values.get(key, default)

    def need(self, key: str) -> Any:
        """A value that the model cannot be without. Raises UnsupportedModel."""
        if key not in self._values:
            model = self.given.get("model_type")
            raise UnsupportedModel(f"config.json of this {model} model has no {key!r}; is it complete?")
        return self._values[key]

    def flag(self, key: str) -> bool:
        """A switch as written, null included."""
        return bool(self.given.get(key, self.defaults.get(key, False)))

    def first(self, *keys: str) -> Any:
        """The first of several names that the config gives, else that the defaults give; saved configs carry either."""
        return next((c[k] for c in (self.given, self.defaults) for k in keys if c.get(k)), 0)

    @cached_property
    def text(self) -> str:
        """What was given, as JSON: sub-layers that transformers has a say in keep it."""
        return json.dumps(dict(self.given), sort_keys=True)

    @cached_property
    def hidden(self) -> int:
        return self.need("hidden_size")

    @cached_property
    def layers(self) -> int:
        return self.need("num_hidden_layers")

    @cached_property
    def heads(self) -> int:
        return self.need("num_attention_heads")

    @cached_property
    def kv_heads(self) -> int:
        return self.get("num_key_value_heads") or self.heads

    @cached_property
    def head_dim(self) -> int:
        return self.get("head_dim") or self.hidden // self.heads

    @cached_property
    def eps(self) -> float:
        return self.get("rms_norm_eps", 1e-6)

    @cached_property
    def experts(self) -> int:
        return self.first("num_experts", "num_local_experts", "n_routed_experts")

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts, by the keys that Qwen's configs say it with."""
        dense = self.get("mlp_only_layers") or ()
        return bool(self.experts) and layer not in dense and (layer + 1) % self.get("decoder_sparse_step", 1) == 0

    @cached_property
    def _rope(self) -> dict[str, Any]:
        """Parameters of both generations of configs, theta among them."""
        found = dict(self.get("rope_parameters") or {})
        found.update(self.get("rope_scaling") or {})
        return found

    def parameter(self, key: str) -> Any:
        """One of the rope parameters, None where it is not given."""
        return self._rope.get(key)

    @cached_property
    def theta(self) -> float:
        return float(self._rope.get("rope_theta") or self.get("rope_theta", 10000.0))

    @cached_property
    def scaling(self) -> Mapping[str, Any] | None:
        """The parameters of a rope scaling, None without one."""
        rope = {k: v for k, v in self._rope.items() if k != "rope_theta"}
        return None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope

    @cached_property
    def turning_share(self) -> float:
        """The part of a head that rotary positions turn."""
        return self._rope.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))

    def rope(self, dim: int | None = None) -> Rope:
        """Rotary positions on `dim` channels of a head, all by default.

        Raises UnsupportedModel where the config turns a part of them only and the family has not said that it knows.
        """
        if dim is None and self.turning_share != 1.0:
            raise UnsupportedModel("partial_rotary_factor other than 1 is not supported")
        scaling = "" if self.scaling is None else json.dumps(dict(self.scaling), sort_keys=True)
        config = self.text if scaling else ""
        positions = self.get("max_position_embeddings", 2048)
        return Rope(dim or self.head_dim, self.theta, positions, scaling, config)

    def sliding_window(self) -> int | None:
        """The width of the model's sliding windows, None where it has none; null means none, absent the default."""
        window = {**self.defaults, **self.given}.get("sliding_window")
        return None if window and self.get("use_sliding_window", True) is False else window

    def window(self, layer: int, rule: str = "all") -> int | None:
        """The window of one layer. rule: "all" layers slide; or as layer_types says and, without it, "late" (from
        max_window_layers on) or "even" (even layers below it)."""
        kinds, first = self.given.get("layer_types"), self.given.get("max_window_layers", 28)
        if rule == "all":
            slides = True
        elif kinds is not None:
            slides = kinds[layer] == "sliding_attention"
        else:
            slides = layer >= first if rule == "late" else layer % 2 == 0 and layer < first
        return self.sliding_window() if slides else None
