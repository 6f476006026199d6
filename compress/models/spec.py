"""What a model is, read from config.json alone: no weights, no torch.

A `Family` is a table: which sub-modules a decoder block has and what they are called on disk and in GGUF.
`load_spec` turns a raw config into a `ModelSpec`; `ModelSpec.tensors()` lists every tensor with its role.
Adding a family is one file in this folder with a `FAMILY` table in it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from compress.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint.

    `input` names the activations a 2-D weight multiplies; weights with the same layer and `input` share their
    statistics (q/k/v; gate/up of one expert). None for embeddings, norms and biases.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    expert: int | None
    gguf: str
    input: str | None

    @property
    def half(self) -> str:
        """Which half of its block the tensor belongs to: "attention" or "ffn"."""
        return "attention" if ".self_attn." in self.name or self.gguf.endswith("attn_norm.weight") else "ffn"

    @property
    def parameters(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True)
class MoeNames:
    """Where a family keeps its experts, relative to `model.layers.N.`."""

    router: str
    expert: str
    """Prefix of one expert with `{e}`, e.g. `mlp.experts.{e}.`"""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str | None = None
    """Prefix of the shared expert, e.g. `mlp.shared_expert.`"""
    shared_router: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture family as a table."""

    model_types: tuple[str, ...]
    hf_architecture: str
    gguf_arch: str
    qk_norm: bool = False
    """RMSNorm on each query and key head before RoPE (Qwen3)."""
    attention_bias: str | bool = False
    """True, False or the config key that says so; covers q, k and v."""
    output_bias: str | bool = False
    """The same for o_proj."""
    mlp_bias: str | bool = False
    moe: MoeNames | None = None
    normalises_top_k: str | bool = True
    """Whether the chosen experts' probabilities are renormalised to sum to one; a key or a constant."""
    sliding_window: bool = False
    """Whether the config's sliding_window is honoured (subject to use_sliding_window)."""
    window_rule: str = "all"
    """Which layers slide: "all"; or as the config's layer_types says and, without it, "late" (from max_window_layers
    on) or "even" (even layers below it)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of absent config keys, as transformers fills them in."""


@dataclass(frozen=True)
class ModelSpec:
    """A parsed config.json."""

    family: Family
    config: Mapping[str, Any]
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    max_positions: int
    sliding_window: int | None
    norm_topk: bool
    sparse_layers: frozenset[int]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` has routed experts instead of a dense MLP."""
        return layer in self.sparse_layers

    def flag(self, value: str | bool) -> bool:
        """A family's True/False/config-key as a bool."""
        return bool(self.config.get(value, self.family.defaults.get(value, False))) if isinstance(value, str) else value

    def untied(self) -> ModelSpec:
        """The same model with a head of its own."""
        return replace(self, tied=False, config={**self.config, "tie_word_embeddings": False})

    def tensors(self) -> list[TensorSpec]:
        """Every tensor in execution order: embeddings, blocks, final norm, head (absent when tied)."""
        out = [
            TensorSpec(
                "model.embed_tokens.weight",
                (self.vocab_size, self.hidden_size),
                "embeddings",
                None,
                None,
                "token_embd.weight",
                None,
            )
        ]
        for layer in range(self.layers):
            out.extend(self.block_tensors(layer))
        out.append(
            TensorSpec("model.norm.weight", (self.hidden_size,), "norms", None, None, "output_norm.weight", None)
        )
        if not self.tied:
            out.append(
                TensorSpec(
                    "lm_head.weight",
                    (self.vocab_size, self.hidden_size),
                    "lm_head",
                    None,
                    None,
                    "output.weight",
                    "lm_head",
                )
            )
        return out

    def block_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Tensors of one decoder block."""
        fam, h, hd = self.family, self.hidden_size, self.head_dim
        root, blk = f"model.layers.{layer}.", f"blk.{layer}."

        def one(
            name: str, shape: tuple[int, ...], role: str, gguf: str, input: str | None = None, expert: int | None = None
        ) -> TensorSpec:
            return TensorSpec(root + name, shape, role, layer, expert, blk + gguf, input)

        yield one("input_layernorm.weight", (h,), "norms", "attn_norm.weight")
        projections = (
            ("q", self.heads * hd, h, fam.attention_bias, "attn_q", "attention.in"),
            ("k", self.kv_heads * hd, h, fam.attention_bias, "attn_k", "attention.in"),
            ("v", self.kv_heads * hd, h, fam.attention_bias, "attn_v", "attention.in"),
            ("o", h, self.heads * hd, fam.output_bias, "attn_output", "attention.out"),
        )
        for leaf, rows, cols, bias, gguf, key in projections:
            yield one(f"self_attn.{leaf}_proj.weight", (rows, cols), f"attention.{leaf}", f"{gguf}.weight", key)
            if self.flag(bias):
                yield one(f"self_attn.{leaf}_proj.bias", (rows,), "biases", f"{gguf}.bias")
        if fam.qk_norm:
            yield one("self_attn.q_norm.weight", (hd,), "norms", "attn_q_norm.weight")
            yield one("self_attn.k_norm.weight", (hd,), "norms", "attn_k_norm.weight")
        yield one("post_attention_layernorm.weight", (h,), "norms", "ffn_norm.weight")
        if not self.is_sparse(layer):
            i = self.intermediate_size
            for leaf, rows, cols in (("gate", i, h), ("up", i, h), ("down", h, i)):
                key = "mlp.act" if leaf == "down" else "mlp.in"
                yield one(f"mlp.{leaf}_proj.weight", (rows, cols), f"mlp.{leaf}", f"ffn_{leaf}.weight", key)
                if self.flag(fam.mlp_bias):
                    yield one(f"mlp.{leaf}_proj.bias", (rows,), "biases", f"ffn_{leaf}.bias")
            return
        moe = fam.moe
        assert moe is not None
        yield one(moe.router, (self.experts, h), "router", "ffn_gate_inp.weight", "router")
        i = self.moe_intermediate_size
        for leaf, rows, cols in (("gate", i, h), ("up", i, h), ("down", h, i)):
            for e in range(self.experts):
                key = f"experts.{e}.{'act' if leaf == 'down' else 'in'}"
                yield one(
                    f"{moe.expert.format(e=e)}{getattr(moe, leaf)}.weight",
                    (rows, cols),
                    f"routed_experts.{leaf}",
                    f"ffn_{leaf}_exps.weight",
                    key,
                    e,
                )
        if moe.shared:
            i = self.shared_intermediate_size
            for leaf, rows, cols in (("gate", i, h), ("up", i, h), ("down", h, i)):
                key = "shared.act" if leaf == "down" else "shared.in"
                yield one(
                    f"{moe.shared}{leaf}_proj.weight",
                    (rows, cols),
                    f"shared_experts.{leaf}",
                    f"ffn_{leaf}_shexp.weight",
                    key,
                )
            if moe.shared_router:
                yield one(moe.shared_router, (1, h), "router", "ffn_gate_inp_shexp.weight", "router")


@cache
def known_families() -> Mapping[str, Family]:
    """model_type -> Family, collected from the files of this folder."""
    found: dict[str, Family] = {}
    package = importlib.import_module("compress.models.families")
    for module in pkgutil.iter_modules(package.__path__):
        family = getattr(importlib.import_module(f"compress.models.families.{module.name}"), "FAMILY", None)
        if family is not None:
            found.update(dict.fromkeys(family.model_types, family))
    return found


def load_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Parse a raw config.json.

    Raises UnsupportedModel for an unknown `model_type` (listing the supported ones) or an unsupported option.
    """
    model_type = config.get("model_type")
    known = known_families()
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported{hint}; supported: {', '.join(sorted(known))}"
        )
    family = known[model_type]
    merged = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}

    def need(key: str) -> Any:
        if key not in merged:
            raise UnsupportedModel(f"config.json of this {model_type} model has no {key!r}; is it complete?")
        return merged[key]

    activation = merged.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported (silu only)")
    layers, heads, hidden = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    rope = dict(merged.get("rope_parameters") or {})
    rope.update(merged.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or merged.get("rope_theta", 10000.0)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", merged.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not supported")
    # saved configs carry either name; a family's default stands in only when both are absent
    experts = next(
        (c[k] for c in (config, family.defaults) for k in ("num_experts", "num_local_experts") if c.get(k)), 0
    )
    sparse: frozenset[int] = frozenset()
    if family.moe is not None and experts:
        step, dense = merged.get("decoder_sparse_step", 1), set(merged.get("mlp_only_layers") or ())
        sparse = frozenset(n for n in range(layers) if n not in dense and (n + 1) % step == 0)
    # null means no window; only an absent key means the default
    window = {**family.defaults, **config}.get("sliding_window") if family.sliding_window else None
    if window and merged.get("use_sliding_window", True) is False:
        window = None
    norm_topk = family.normalises_top_k
    return ModelSpec(
        family=family,
        config=dict(config),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=merged.get("num_key_value_heads") or heads,
        head_dim=merged.get("head_dim") or hidden // heads,
        vocab_size=need("vocab_size"),
        intermediate_size=need("intermediate_size"),
        experts=experts,
        experts_per_token=merged.get("num_experts_per_tok", 0),
        moe_intermediate_size=merged.get("moe_intermediate_size") or merged["intermediate_size"],
        shared_intermediate_size=merged.get("shared_expert_intermediate_size", 0),
        norm_eps=merged.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=None if rope_type == "default" else rope,
        tied=bool(merged.get("tie_word_embeddings", False)),
        max_positions=merged.get("max_position_embeddings", 2048),
        sliding_window=window,
        norm_topk=bool(merged.get(norm_topk, False)) if isinstance(norm_topk, str) else norm_topk,
        sparse_layers=sparse,
    )
