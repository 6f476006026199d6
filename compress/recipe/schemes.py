"""Named schemes, expanded to rules: `W4A16` and its kin, llama.cpp's mixes (`Q4_K_M`, ...), and `EXPERTS_2BIT` and its kin.

A `W{2,3,4,8}A16[G{32,64,128}][_ASYM]` scheme is one rule. A llama.cpp mix depends on the model (layers,
experts, grouped-query attention, tied embeddings); `ggml_type` states the choice llama-quantize makes for
each tensor, as read in llama-quant.cpp (mid 2026) and checked against the library itself in
tests/integration/test_schemes.py. An `EXPERTS_*` scheme is ours: few bits for the routed experts, which are nearly all
of a mixture's weights, eight for everything that every token passes; llama.cpp's mixes treat 8 experts so, no other
number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.codecs.names import fits
from compress.errors import PlanError
from compress.reading import in_words
from compress.recipe.rules import FLOAT_ROLES, Rule, nearest

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec

_UNIFORM = re.compile(r"W([2348])A16(?:_?G(32|64|128))?(_ASYM)?|W8A8")
UNIFORM_SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W3A16", "W2A16")
LINEARS = ("attention", "mlp", "routed_experts", "shared_experts")

GGML_SCHEMES: dict[str, str] = {
    "Q8_0": "q8_0",
    "Q6_K": "q6_k",
    "Q5_K_M": "q5_k",
    "Q5_K_S": "q5_k",
    "Q4_K_M": "q4_k",
    "Q4_K_S": "q4_k",
    "Q4_0": "q4_0",
    "Q3_K_L": "q3_k",
    "Q3_K_M": "q3_k",
    "Q3_K_S": "q3_k",
    "Q2_K": "q2_k",
    "IQ4_XS": "iq4_xs",
    "IQ4_NL": "iq4_nl",
    "IQ3_M": "iq3_s",
    "IQ3_S": "iq3_s",
    "IQ3_XS": "iq3_s",
    "IQ3_XXS": "iq3_xxs",
    "IQ2_M": "iq2_s",
    "IQ2_S": "iq2_xs",
    "IQ2_XS": "iq2_xs",
    "IQ2_XXS": "iq2_xxs",
    "IQ1_M": "iq1_m",
    "IQ1_S": "iq1_s",
    "TQ2_0": "tq2_0",
    "TQ1_0": "tq1_0",
    "MXFP4_MOE": "mxfp4",
}
"""Each llama.cpp mix and the type most of its tensors have."""

# Mixes that llama.cpp treats by rules of their own.
_TWO_BIT = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

EXPERT_SCHEMES: dict[str, tuple[str, str]] = {
    "EXPERTS_4BIT": ("iq4_xs", "q4_k"),
    "EXPERTS_3BIT": ("iq3_xxs", "q3_k"),
    "EXPERTS_2BIT": ("iq2_xxs", "q2_k"),
    "EXPERTS_1BIT": ("iq1_m", "iq2_xxs"),
}
"""Codecs of the routed experts' gate and up, and of their down, whose errors enter the residual stream directly."""

_EDGES = ("first 1/8", "last 1/8")  # EXPERTS_1BIT gives these layers the codecs of EXPERTS_2BIT

SCHEMES: tuple[str, ...] = (*UNIFORM_SCHEMES, *GGML_SCHEMES, *EXPERT_SCHEMES)


def scheme_name(name: str) -> str:
    """The canonical (upper case) name of a scheme; ValueError with the nearest names when there is none."""
    canonical = name.strip().upper().replace("-", "_")
    if canonical in GGML_SCHEMES or canonical in EXPERT_SCHEMES or _UNIFORM.fullmatch(canonical):
        return canonical
    raise ValueError(f"unknown scheme {in_words(name)}{nearest(name, SCHEMES)}")


def scheme_kind(name: str) -> str:
    """`ggml` or `uniform`: the kind of codec a scheme uses."""
    return "uniform" if _UNIFORM.fullmatch(scheme_name(name)) else "ggml"


def uniform_rule(name: str) -> Rule | None:
    """The one rule that a scheme of plain integers is, whatever the model; None for the others."""
    scheme = scheme_name(name)
    if scheme == "W8A8":
        return Rule(targets=LINEARS, codec="int8-row", activations="int8")
    if (match := _UNIFORM.fullmatch(scheme)) is None:
        return None
    bits, group, asymmetric = match.groups()
    # Users know W8A16 as one scale per output channel; below 8 bits as groups of 128.
    span = f"g{group}" if group else "row" if bits == "8" else "g128"
    return Rule(targets=LINEARS, codec=f"int{bits}-{span}{'-asym' if asymmetric else ''}")


def expand(name: str, model: ModelSpec, *, imatrix: bool = True) -> tuple[Rule, ...]:
    """The rules of scheme `name` for `model`; roles they do not cover keep the checkpoint's float type.

    `imatrix` says whether the mix is the one llama-quantize would write with an importance matrix; our
    solvers always have the calibration statistics that stand for one. PlanError for an `EXPERTS_*` scheme and a model
    without routed experts.
    """
    scheme = scheme_name(name)
    if (rule := uniform_rule(scheme)) is not None:
        return (rule,)
    if scheme in EXPERT_SCHEMES:
        return _expert_rules(scheme, model)
    layers_of: dict[str, dict[str, list[int]]] = {}
    for role, layer, downs in _quantized_roles(model):
        codec = ggml_type(scheme, model, role, layer, downs, imatrix)
        layers_of.setdefault(role, {}).setdefault(codec, []).append(layer)
    rules: dict[tuple[str, tuple[str, ...] | None], list[str]] = {}
    for role, by_codec in layers_of.items():
        usual = max(by_codec, key=lambda codec: len(by_codec[codec]))
        for codec, layers in by_codec.items():
            rules.setdefault((codec, None if codec == usual else ranges(layers)), []).append(role)
    exceptions_first = sorted(rules.items(), key=lambda item: item[0][1] is None)
    return (
        *(Rule(targets=tuple(roles), codec=codec, layers=layers) for (codec, layers), roles in exceptions_first),
        Rule(targets=FLOAT_ROLES, codec="f32"),
    )


def _expert_rules(scheme: str, model: ModelSpec) -> tuple[Rule, ...]:
    if not model.experts:
        raise PlanError(
            f"scheme {scheme} is about routed experts and {model.model_type} has none; use a scheme like Q4_K_M or IQ2_M"
        )

    def experts(name: str, layers: tuple[str, ...] | None = None) -> tuple[Rule, Rule]:
        wide, down = EXPERT_SCHEMES[name]
        return (
            Rule(targets=("routed_experts.gate", "routed_experts.up"), codec=wide, layers=layers),
            Rule(targets=("routed_experts.down",), codec=down, layers=layers),
        )

    return (
        *(experts("EXPERTS_2BIT", _EDGES) if scheme == "EXPERTS_1BIT" else ()),
        *experts(scheme),
        Rule(targets=("attention", "mlp", "shared_experts", "embeddings", "lm_head"), codec="q8_0"),
        Rule(targets=FLOAT_ROLES, codec="f32"),
    )


def ranges(layers: list[int]) -> tuple[str, ...]:
    """Sorted layer numbers in the recipe's own grammar: [0, 1, 2, 5] -> ('0-2', '5')."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return tuple(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _quantized_roles(model: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """(role, layer, number of `ffn_down*` tensors before it) in llama.cpp's order; layer 0 where there is
    none.
    """
    yield "embeddings", 0, 0
    if not model.tied:
        yield "lm_head", 0, 0
    downs = 0
    for layer, block in enumerate(model.blocks):
        for sublayer in block:
            for role in dict.fromkeys(w.role for w in sublayer.weights if w.input and w.role not in FLOAT_ROLES):
                yield role, layer, downs
                downs += role.endswith(".down")


def ggml_type(scheme: str, model: ModelSpec, role: str, layer: int, downs: int, imatrix: bool) -> str:
    """The ggml type llama-quantize gives to the tensors of `role` in `layer`, before any fallback for odd
    rows.

    `downs` counts the `ffn_down*` tensors of the file before this one: the 2-bit mixes go by that count, the
    others by layer.
    """
    usual = GGML_SCHEMES[scheme]
    if scheme == "MXFP4_MOE":
        return "mxfp4" if role.startswith("routed_experts.") and model.experts > 1 else "q8_0"
    if role == "lm_head" or (role == "embeddings" and model.tied):
        return _output_type(scheme, usual, model.hidden_size)
    if role == "embeddings":
        return _EMBEDDINGS.get(scheme, usual)
    count, eight = model.layers, model.experts == 8
    if role == "attention.v":
        return _value_type(scheme, usual, model, layer)
    if role == "attention.k" and eight:
        return "q4_k" if scheme in _TWO_BIT else "q8_0"
    if role == "attention.qkv":
        more = {**dict.fromkeys(("Q3_K_M", "Q3_K_L", "IQ3_M"), "q4_k"), "Q4_K_M": "q5_k", "Q5_K_M": "q6_k"}
        return more.get(scheme, usual)
    if role in ("attention.q", "attention.k"):
        return {"IQ3_XXS": "iq2_s", "IQ3_XS": "iq3_xxs"}.get(scheme, usual)
    if role == "attention.o" and eight:
        keeps = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_0", "Q3_K_L", "TQ1_0", "TQ2_0")
        return usual if scheme in keeps else "q5_k"
    if role == "attention.o":
        return _ATTENTION_OUTPUT.get(scheme, usual)
    if role.endswith(".down"):
        return _down_type(scheme, usual, model, layer, downs, imatrix)
    if scheme == "IQ3_XS" and count // 8 <= layer < 7 * count // 8:
        return "iq3_xxs"  # gate and up
    return usual


_EMBEDDINGS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "q2_k"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "iq3_s"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "q4_k"),
}
_ATTENTION_OUTPUT = {
    "Q2_K": "q3_k",
    "Q3_K_M": "q4_k",
    "Q3_K_L": "q5_k",
    "IQ3_M": "q4_k",
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "iq3_s"),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), "iq2_xxs"),
}


def _output_type(scheme: str, usual: str, hidden_size: int) -> str:
    if not fits(usual, hidden_size) or usual == "q8_0":
        return "q8_0"
    return "q5_k" if scheme in (*_TWO_BIT, "IQ3_XXS") else "q6_k"


def _value_type(scheme: str, usual: str, model: ModelSpec, layer: int) -> str:
    grouped = model.heads // model.kv_heads >= 4
    if scheme in _TWO_BIT:
        return "q4_k" if grouped or model.experts >= 4 else "iq3_s" if scheme in ("IQ2_S", "IQ2_M") else "q2_k"
    if model.experts == 8:
        return "q8_0"
    chosen = usual
    if scheme == "Q2_K":
        chosen = "q4_k" if grouped else "q3_k"
    elif scheme == "IQ3_M" or (scheme in ("IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped):
        chosen = "q4_k"
    elif scheme == "Q3_K_M":
        chosen = "q5_k" if layer < 2 else "q4_k"
    elif scheme == "Q3_K_L" or (scheme in ("IQ4_NL", "IQ4_XS") and grouped):
        chosen = "q5_k"
    elif scheme in ("Q4_K_M", "Q5_K_M") and use_more_bits(layer, model.layers):
        chosen = "q6_k"
    elif scheme == "Q4_K_S" and layer < 4:
        chosen = "q5_k"
    # What llama.cpp calls a 70B: attn_v is an eighth of attn_q there, so more bits cost nothing.
    arch = model.gguf_arch
    is_70b = model.layers == 80 and (arch == "qwen2" or (arch == "llama" and model.heads != model.kv_heads))
    return "q5_k" if is_70b and chosen in ("q3_k", "q4_k") else chosen


def _down_type(scheme: str, usual: str, model: ModelSpec, layer: int, downs: int, imatrix: bool) -> str:
    count = model.layers
    if scheme in _TWO_BIT:
        more = "iq3_s" if scheme in ("IQ2_S", "IQ2_M") else "q2_k"
        return more if downs < count // 8 else usual
    if scheme == "Q2_K":
        return "q3_k"
    if scheme == "Q3_K_M":
        return "q5_k" if layer < count // 16 else "q4_k"
    if scheme == "Q3_K_L":
        return "q5_k"
    if scheme in ("Q4_K_M", "Q5_K_M"):
        return "q6_k" if use_more_bits(layer, count) else usual
    if scheme == "IQ3_M" and (layer < count // 8 or (model.experts == 8 and use_more_bits(layer, count))):
        return "q4_k"
    if layer < count // 8:
        if scheme == "Q4_K_S" or (scheme in ("IQ4_NL", "IQ4_XS") and not imatrix):
            return "q5_k"
        if scheme == "Q4_0" and imatrix:
            return "q4_1"
    if scheme == "IQ3_XXS" and not imatrix:
        return "q4_k" if layer < count // 8 else "q3_k"
    return usual


def use_more_bits(layer: int, count: int) -> bool:
    """llama.cpp's pick of layers that deserve more: the first and last eighth, and every third between."""
    return layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2
