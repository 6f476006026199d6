"""Rules, layer ranges and the matcher, against a slow matcher written from the documentation."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.codecs.names import (
    FIXED_NAMES,
    UNIFORM_NAMES,
    block_columns,
    codec_info,
    ggml_fallback,
    row_bytes,
    stored_bytes,
)
from compress.models.spec import TensorSpec, load_spec
from compress.recipe.rules import GROUPS, ROLES, Rule, RuleMatcher, check_layers, layer_set, match

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (5, 8, {5}),
        ("0-3", 8, {0, 1, 2, 3}),
        ("2 - 3", 8, {2, 3}),
        ("first 2", 8, {0, 1}),
        ("Last 2", 8, {6, 7}),
        ("last 20", 8, set(range(8))),
        ("first 1/8", 32, {0, 1, 2, 3}),
        ("last 1/4", 4, {3}),
        ("last 1/4", 3, {2}),
        ("first 3/8", 12, {0, 1, 2, 3}),
        ("6-9", 8, {6, 7}),
        ("9", 8, set()),
    ],
)
def test_layer_grammar(layers, count, expected):
    assert layer_set((check_layers(layers),), count) == expected


@pytest.mark.parametrize("layers", ["-4:", "3-1", "first", "last 9/8", "first 1/0", "all", -1, 1.5, True, ""])
def test_layer_grammar_refuses(layers):
    with pytest.raises(ValidationError) as caught:
        Rule(targets="mlp", codec="q4_k", layers=layers)
    assert "layers" in str(caught.value)


def slow_match(rules, tensor, layers):
    """First match wins, word by word as docs/recipes.md says it."""
    for rule in rules:
        floats = rule.codec in ("f32", "f16", "bf16")
        if not floats and (len(tensor.shape) < 2 or tensor.role == "router"):
            continue
        if rule.layers is not None and tensor.layer not in layer_set(rule.layers, layers):
            continue
        for target in rule.targets:
            if target.startswith("re:"):
                names = (tensor.name, re.sub(r"\.weight$", "", tensor.name))
                if any(re.match(target[3:], name) for name in names):
                    return rule
            elif tensor.role == target or tensor.role.split(".")[0] == target:
                return rule
    return None


TARGETS = (
    *ROLES,
    *GROUPS,
    r"re:.*self_attn\.[qk]_proj$",
    r"re:model\.layers\.[13]\.",
    "re:.*experts.0.*",
    "re:.*bias",
)
RULES = st.builds(
    Rule,
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3),
    codec=st.sampled_from(["f32", "q8_0", "q4_k", "int4-g128"]),
    layers=st.none() | st.sampled_from(["0-2", "last 1/4", "first 1", ["0", "4-9"]]),
)


@given(rules=st.lists(RULES, max_size=5), seed=st.integers(0, 99))
def test_matcher_agrees_with_slow_matcher(rules, seed):
    spec = load_spec(MOE)
    tensors = list(spec.tensors())
    random.Random(seed).shuffle(tensors)  # the cache must not depend on the order of questions
    matcher = RuleMatcher(rules, spec.layers)
    found = [matcher.match(tensor) for tensor in tensors]
    assert found == [slow_match(rules, tensor, spec.layers) for tensor in tensors]
    assert all(rule not in found for rule in matcher.unused() if rules.count(rule) == 1)


def test_ignore_comes_first_and_unused_rules_are_known():
    spec = load_spec(MOE)
    rules = [Rule(targets="attention", codec="q8_0"), Rule(targets="shared_experts", codec="q4_k")]
    matcher = RuleMatcher(rules, spec.layers, ["attention.q", "re:.*k_proj"])
    chosen = {t.role: matcher.match(t) for t in spec.tensors() if t.role.startswith("attention")}
    assert chosen["attention.q"] is None and chosen["attention.k"] is None
    assert chosen["attention.v"] is rules[0]
    assert matcher.unused() == (rules[1],)


def test_one_tensor():
    tensor = TensorSpec("model.layers.3.mlp.down_proj.weight", (8, 8), "mlp.down", 3, None, "", None)
    rule = Rule(targets="mlp", codec="Q6_K", layers="last 1")
    assert match([rule], tensor, 4) is rule and rule.codec == "q6_k"
    assert match([rule], tensor, 5) is None


def test_sizes_agree_with_gguf():
    gguf = pytest.importorskip("gguf")
    for name in (*FIXED_NAMES, "q5_0", "q5_1"):
        if codec_info(name).kind not in ("float", "ggml"):
            continue
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert (block_columns(name), row_bytes(name, 512)) == (block, 512 // block * size)


def test_fallbacks():
    expected = {"iq2_xxs": "iq4_nl", "iq4_xs": "iq4_nl", "q2_k": "q4_0", "q3_k": "q4_0", "q6_k": "q8_0"}
    expected |= {"q4_k": "q5_0", "q5_k": "q5_1", "iq3_xxs": "iq4_nl", "iq2_xs": "iq4_nl"}
    for codec, fallback in expected.items():
        assert ggml_fallback(codec, 512) is None
        assert ggml_fallback(codec, 288) == fallback
        assert ggml_fallback(codec, 300) == "f16"
    assert ggml_fallback("q8_0", 40) == "f16" and ggml_fallback("f32", 7) is None


def test_uniform_sizes_count_words():
    """By hand, for a GPTQ checkpoint's int32 qweight and qzeros, float16 scales and int32 g_idx."""
    assert stored_bytes("int4-g128", (256, 512)) == 256 * 512 // 2 + 4 * 256 * 2 + 4 * 256 // 2 + 512 * 4
    assert stored_bytes("int3-g64", (64, 128)) == 12 * 64 * 4 + 2 * 64 * 2 + 2 * 6 * 4 + 128 * 4
    assert stored_bytes("int8-row-asym", (8, 40)) == 10 * 8 * 4 + 8 * 2 + 2 * 4 + 40 * 4
    assert stored_bytes("bf16", (3, 5, 7)) == 210
    assert stored_bytes("iq2_xxs", (12, 4, 256)) == 12 * 4 * 66


def test_uniform_names():
    assert len(set(UNIFORM_NAMES)) == 32
    info = codec_info("INT3-G64-asym")
    assert (info.name, info.bits, info.block, info.symmetric) == ("int3-g64-asym", 3, 64, False)
    assert codec_info("int8-row").block == 0
    for wrong in ("int5-g128", "int4", "int4-g100", "q4k", ""):
        with pytest.raises(KeyError):
            codec_info(wrong)
