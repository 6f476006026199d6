"""The schemas of config.json: every family's own config passes, and what is wrong or contradictory is told by key, all at once."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from compress.errors import ConfigError, UnsupportedModel
from compress.models import known_families, load_spec
from tests.tiny import FAMILIES, tiny_config


def problems(family: str, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_spec({**tiny_config(family), **changes})
    assert error.value.exit_code == 2
    assert str(error.value).splitlines() == [f"config.json: {problem}" for problem in error.value.problems]
    return error.value.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_passes_and_unknown_keys_do_no_harm(family: str) -> None:
    config = tiny_config(family)
    plain = load_spec(config)
    more = {"auto_map": {"x": []}, "use_cache": "yes", "_name_or_path": 3, "mystery": [[{}]]}
    named = {"architectures": [known_families()[family].hf_architecture]}
    assert load_spec({**config, **more, **named}).tensors() == plain.tensors()
    assert load_spec({**config, "architectures": []}).tensors() == plain.tensors()


def test_everything_wrong_is_told_at_once() -> None:
    found = problems(
        "llama", hidden_size="64", num_hidden_layers=10**9, rms_norm_eps=float("nan"), tie_word_embeddings=1
    )
    assert sorted(found) == [
        "hidden_size: expected a whole number, got '64'",
        "num_hidden_layers: must be at most 1024, got 1000000000",
        "rms_norm_eps: expected a finite number, got nan",
        "tie_word_embeddings: expected true or false, got 1",
    ]
    found = problems("qwen3_moe", num_experts_per_tok=40, num_key_value_heads=3, num_experts=6, num_local_experts=5)
    assert [line.split(":")[0] for line in found] == [
        "num_attention_heads", "num_experts is 6 and num_local_experts is 5; leave the wrong one out", "num_experts_per_tok",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps: must be more than 0"),
        ("llama", {"vocab_size": 0}, "vocab_size: must be at least 1"),
        ("qwen3", {"head_dim": 0}, "head_dim: must be at least 1"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16}, "divide the hidden_size"),
        (
            "mistral",
            {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None},
            "do not divide the hidden_size",
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types: a list of 3 for the 2 layers"),
        ("qwen3", {"layer_types": ["full_attention", "attention"]}, "layer_types[1]: input should be"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "layer_types: a list of 1"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads: 3 heads"),
        ("qwen3_moe", {"mlp_only_layers": 0.5}, "mlp_only_layers: expected a list, got 0.5"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: must be at least 1"),
        ("qwen3_moe", {"num_experts": 4096, "num_hidden_layers": 1000}, "1000 layers of 4096 experts"),
        ("llama", {"rope_parameters": 3}, "rope_parameters: expected a mapping, got 3"),
        ("llama", {"rope_theta": 5e5}, "rope_parameters.rope_theta is 10000.0 and rope_theta is 500000.0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "of two kinds, default and linear"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: missing"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "is 'linear' and"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of some layers alone"),
        ("llama", {"quantization_config": "x"}, "quantization_config: expected a mapping, got 'x'"),
        ("llama", {"eos_token_id": {"a": 1}}, "eos_token_id: expected a token's id or a list of ids"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("deepseek_v3", {"n_group": 3}, "n_group: 8 experts do not divide into 3 groups"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group: 5 of the 4 groups"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok: the 1 groups"),
        ("deepseek_v2", {"topk_method": "noaux"}, "topk_method: input should be"),
    ],
)
def test_wrong_kinds_and_contradictions(family: str, changes: dict[str, Any], words: str) -> None:
    found = problems(family, **changes)
    assert any(words in line for line in found), found


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_keys_no_model_can_be_without(key: str) -> None:
    config = tiny_config("llama")
    del config[key]
    with pytest.raises(ConfigError) as error:
        load_spec(config)
    assert error.value.problems == [f"{key}: missing; is config.json complete?"]


def test_channels_that_cannot_turn_in_pairs() -> None:
    with pytest.raises(UnsupportedModel, match="33 channels of a head cannot turn in pairs"):
        load_spec({**tiny_config("qwen3"), "head_dim": 33})


@pytest.mark.parametrize(
    ("family", "names", "fits"),
    [
        ("llama", ["LlamaForCausalLM"], True),
        ("llama", ["LLaMAForCausalLM"], True),
        ("llama", ["MyLlamaForCausalLM"], True),
        ("llama", None, True),
        ("llama", ["LlamaForSequenceClassification"], False),
        ("llama", ["LlamaModel"], False),
        ("llama", ["MistralForCausalLM"], False),
        ("qwen2", ["Qwen2MoeForCausalLM"], False),
        ("qwen3_moe", ["Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"], True),
    ],
)
def test_architectures_name_a_causal_language_model(family: str, names: list[str] | None, fits: bool) -> None:
    config = {**tiny_config(family), "architectures": names}
    if fits:
        assert load_spec(config).blocks == load_spec({**config, "architectures": None}).blocks
        return
    (line,) = problems(family, architectures=names)
    assert line.startswith("architectures:") and known_families()[family].hf_architecture in line


def test_null_means_the_default_where_it_is_no_value() -> None:
    config = json.loads(json.dumps(tiny_config("mistral")))
    del config["sliding_window"]
    assert load_spec(config).sliding_window == 4096  # absent: the family's
    assert load_spec({**config, "sliding_window": None}).sliding_window is None  # null: none
    assert load_spec({**config, "rms_norm_eps": None}).norm_eps == 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nearest_class_says_a_default(family: str) -> None:
    """pydantic looks at bases, Python at the whole order of classes: a schema of several groups must mean the same to both."""
    schema = known_families()[family].config
    for name, field in schema.model_fields.items():
        nearest = next(c for c in schema.__mro__ if name in inspect.get_annotations(c))
        own = nearest.model_fields[name]  # type: ignore[attr-defined]
        assert (own.default, own.annotation) == (field.default, field.annotation), name
