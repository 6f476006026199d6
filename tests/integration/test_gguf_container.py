"""GGUF files of every family: llama.cpp computes what transformers computes, and failures leave nothing behind.

Measured on random tiny models whose logits have a standard deviation of 2 to 9: float32 files differ from
transformers by at most 3e-4 (summation order); the tolerance is 1e-3 of the standard deviation.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.containers import gguf as container
from compress.containers.base import Options, WriteRequest
from compress.errors import CheckpointError, OutputError, UnsupportedModel
from compress.models import load_spec
from compress.models.gguf import pretokenizers as pre_tokenizers
from compress.text.probes import TEXTS
from compress.weights import Packed
from tests.integration.containers import (
    Planned,
    fetcher,
    plan,
    read_gguf,
    reference_logits,
    spec_of,
    token_ids,
    weights_of,
)
from tests.proofs import proved
from tests.tiny import FAMILIES, FOR_LLAMA_CPP, demo_model, tiny_config, tiny_model

TOLERANCE = 1e-3
"""Largest logit difference, in standard deviations of the logits."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.5, 2.0],
}


def _either(full: dict[str, Any], base: float) -> dict[str, Any]:
    """Positions of full layers, and those of sliding ones."""
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": base}}


gelu = torch.nn.functional.gelu


def gelu_by_table(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """As ggml looks it up on a CPU: in a table by half-precision numbers, of half-precision numbers."""
    return gelu(x.half().float(), approximate=approximate).half().float()


PLAIN = Options(tokenizer=False)


def write(model: Path, target: Path, codec: str = "f32", *, tokenizer: bool = False, **options: Any) -> list[Path]:
    """Without a tokenizer unless asked: its 4096 tokens take most of the time."""
    spec, weights = spec_of(model), weights_of(model)
    lines = plan(spec, codec)
    return container.write(
        WriteRequest(
            target,
            spec,
            lines,
            fetcher(weights, lines),
            source=model,
            options=Options(tokenizer=tokenizer, **options),
            provenance={"compress.recipe": "test", "compress.version": "0"},
        )
    )


def llama_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    with LlamaCpp(path, threads=1) as engine:
        return next(engine.logits([ids]))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("moe"))


ATTENTION = ["full_attention"] * 3
GRANITE_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
NEMOTRON_DENSE = ["linear_attention", "mlp", "full_attention", "mlp"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, FOR_LLAMA_CPP.get(family, {})) for family in FAMILIES),
    (
        "llama",  # one odd model: no multiple of 32, grouped heads, tied, biases everywhere
        {
            "hidden_size": 72,
            "intermediate_size": 100,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    ("qwen3_moe", {"hidden_size": 72, "tie_word_embeddings": True}),
    ("nemotron_h", {"layers_block_type": NEMOTRON_DENSE, "mlp_bias": True}),
    ("granitemoehybrid", {**GRANITE_DENSE, "tie_word_embeddings": True}),
    ("granitemoehybrid", {**GRANITE_DENSE, "layer_types": ATTENTION}),
    ("granitemoehybrid", {"layer_types": ATTENTION, "position_embedding_type": "rope"}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("mixtral", {"head_dim": 32, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    ("qwen3", {"rope_parameters": YARN}),
    ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 2048, "original_max_position_embeddings": 1024}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "tie_word_embeddings": True}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "norm_topk_prob": False}),
    ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    (
        "gemma3_text",
        {
            "rope_parameters": _either({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, 5e3),
            "tie_word_embeddings": True,
            "final_logit_softcapping": 5.0,
        },
    ),
    (
        "gemma4_text",
        {
            "enable_moe_block": False,
            "attention_k_eq_v": False,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("olmo3", {"rope_parameters": _either(YARN, 10000.0), "layer_types": None, "num_hidden_layers": 4}),
    ("granite", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
]


@pytest.mark.parametrize(("family", "config"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_llama_cpp_computes_the_model(
    family: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "gelu", gelu_by_table)
    model = tiny_model(family, tmp_path / "model", **config)
    assert container.check_representable(spec_of(model)) == []
    files = write(model, tmp_path / "model.gguf")
    ids = token_ids()
    expected = reference_logits(model, ids)
    difference = float(np.abs(llama_logits(files[0], ids) - expected).max() / expected.std())
    assert difference < TOLERANCE
    proved(family, "llama.cpp", gap=difference)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "normalises"),
        ("qwen2_moe", {"norm_topk_prob": True}, "normalises"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layer 1 is dense"),
        ("qwen3", {"attention_bias": True}, "attn_q.bias"),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tied"),
        ("olmoe", {"num_key_value_heads": 2}, "every head"),
        ("dots1", {"num_key_value_heads": 2}, "every head"),
        ("qwen2", {"rope_parameters": LLAMA3}, "llama3"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "every second layer"),
        ("llama4_text", {"attention_chunk_size": 8192, "attn_scale": 2.0, "floor_scale": 2}, "8192 tokens by 0.1"),
        ("llama4_text", {**FOR_LLAMA_CPP["llama4_text"], "use_qk_norm": False}, "norms queries"),
        ("afmoe", {"mup_enabled": False}, "root of their width"),
        ("mimo_v2_flash", {"routed_scaling_factor": 2.5}, "does not scale"),
        ("gpt_oss", {"attention_bias": False}, "wants biases"),
        ("nemotron_h", {"time_step_min": 0.5}, "limits of time steps"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "norms each of the 2 groups"),
        ("granitemoehybrid", {"layer_types": ATTENTION}, "has rotary positions"),
        ("nemotron_h", {"layers_block_type": [*NEMOTRON_DENSE, "moe"]}, "experts in every feed-forward"),
        ("gemma3_text", {"query_pre_attn_scalar": 1}, "divides scores by the root of 24"),
        ("gemma3_text", {"attention_bias": True}, "attn_q.bias"),
        ("olmo3", {"rope_parameters": _either(YARN, 100.0)}, "one rope_theta"),
        ("gemma2", {"tie_word_embeddings": False}, "a head of its own"),
        ("gemma2", {"query_pre_attn_scalar": 1}, "divides scores by the root of 24"),
        ("gemma4_text", {"rope_parameters": _either({"rope_type": "default", "rope_theta": 1e6}, 1e4)}, "proportional"),
        ("lfm2", {"conv_bias": True}, "shortconv.conv.bias"),
        ("lfm2_moe", {"routed_scaling_factor": 2.5}, "scale routing weights"),
        ("lfm2_moe", {"norm_topk_prob": False}, "normalises"),
        ("lfm2_moe", {"use_expert_bias": False}, "wants a correction"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2}}, "beta_fast"),
    ],
)
def test_what_check_representable_refuses_llama_cpp_gets_wrong(
    family: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Each reason is true of the installed llama.cpp: it refuses the file or computes something else."""
    pytest.importorskip("llama_cpp")
    model = tiny_model(family, tmp_path / "model", **config)
    (found,) = container.check_representable(spec_of(model))
    assert reason in found
    files = write(model, tmp_path / "model.gguf")
    ids = token_ids()
    try:
        logits = llama_logits(files[0], ids)
    except CheckpointError:
        return
    expected = reference_logits(model, ids)
    assert np.abs(logits - expected).max() > 0.5 * expected.std()


def test_sliding_window_is_a_caveat(tmp_path: Path) -> None:
    model = tiny_model("mistral", tmp_path / "model", sliding_window=16)
    spec = spec_of(model)
    assert container.check_representable(spec) == []
    assert "sliding window" in container.caveats(spec)[0]
    ids = token_ids(17)
    expected = reference_logits(model, ids)
    difference = np.abs(llama_logits(write(model, tmp_path / "m.gguf")[0], ids) - expected).max(axis=1)
    assert difference[:16].max() < TOLERANCE * expected.std() < difference[16]


def test_the_ends_of_yarns_ramp_are_a_caveat(tmp_path: Path) -> None:
    """gpt-oss lets it end between channels: the first tokens are alike, later ones less and less."""
    rope = {**YARN, "factor": 32.0, "truncate": False}
    model = tiny_model("gpt_oss", tmp_path / "model", rope_parameters=rope)
    spec = spec_of(model)
    assert container.check_representable(spec) == [] and "truncate: false" in container.caveats(spec)[0]
    ids = token_ids()
    expected = reference_logits(model, ids)
    difference = np.abs(llama_logits(write(model, tmp_path / "m.gguf")[0], ids) - expected).max(axis=1)
    assert difference[0] < TOLERANCE * expected.std() < difference[20:].max()


@pytest.mark.parametrize(
    ("family", "codec"), [("qwen3_moe", "bf16"), ("llama", "f16"), ("mixtral", "f16"), ("qwen2_moe", "f32")]
)
def test_read_back_is_what_was_written(family: str, codec: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model")
    files = write(model, tmp_path / "model.gguf", codec)
    spec, weights = spec_of(model), weights_of(model)
    lines = plan(spec, codec)
    fetch = fetcher(weights, lines)
    dense = container.load_dense(files, spec)
    assert list(dense) != [] and set(dense) == set(weights)
    for line in lines:
        assert torch.equal(dense[line.spec.name], fetch(line.spec.name).parts["values"].float()), line.spec.name
    fields, tensors = read_gguf(files[0])
    seen = {name: (kind, shape) for name, kind, shape, values in tensors if values.shape == shape}
    assert seen == container.inventory(files[0])
    assert {kind for kind, _ in seen.values()} == {"f32", codec}
    assert fields["general.architecture"] == spec.gguf_arch
    assert fields["compress.recipe"] == "test"
    assert not [key for key in fields if "imatrix" in key]


def test_quantized_rows_move_with_their_heads(tmp_path: Path) -> None:
    """q8_0 blocks of q and k are permuted as whole rows: decoding the file gives the decoded blocks."""
    import gguf

    model = tiny_model("llama", tmp_path / "model")
    spec, weights = spec_of(model), weights_of(model)
    lines = [Planned(line.spec, "q8_0" if len(line.spec.shape) == 2 else "f32") for line in plan(spec)]
    codecs = {line.spec.name: line.codec for line in lines}
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = {n: gguf.quantize(w.numpy(), kind) for n, w in weights.items() if codecs[n] == "q8_0"}

    def fetch(name: str) -> Packed:
        shape = tuple(weights[name].shape)
        if name in blocks:
            return Packed("q8_0", shape, {"blocks": torch.from_numpy(blocks[name])})
        return Packed("f32", shape, {"values": weights[name]})

    (file,) = container.write(WriteRequest(tmp_path / "m.gguf", spec, lines, fetch, source=model, options=PLAIN))
    dense = container.load_dense(file, spec)
    for name, data in blocks.items():
        np.testing.assert_array_equal(dense[name].numpy(), gguf.dequantize(data, kind))
    name = "model.layers.0.self_attn.q_proj.weight"
    raw = {n: values for n, _, _, values in read_gguf(file)[1]}["blk.0.attn_q.weight"]
    assert not np.array_equal(raw, dense[name].numpy())


def test_split_set_loads_in_llama_cpp(moe: Path, tmp_path: Path) -> None:
    whole = write(moe, tmp_path / "whole.gguf", "f16")
    parts = write(moe, tmp_path / "parts.gguf", "f16", max_shard_size=300_000)
    count = len(parts)
    assert count > 2
    assert [file.name for file in parts] == [f"parts-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert container.shards(parts[0]) == parts
    assert container.inventory(parts[0]) == container.inventory(whole[0])
    spec, ids = spec_of(moe), token_ids()
    one, other = container.load_dense(whole, spec), container.load_dense(parts[0], spec)
    assert all(torch.equal(one[name], other[name]) for name in one)
    np.testing.assert_array_equal(llama_logits(whole[0], ids), llama_logits(parts[0], ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f.name for f in [*whole, *parts])
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match="is missing; all 3 files"):
        container.inventory(parts[0])


def test_memory_stays_at_one_stacked_tensor(moe: Path, tmp_path: Path) -> None:
    """Tensors are fetched once each, in file order, after the header is written."""
    spec, weights = spec_of(moe), weights_of(moe)
    lines = plan(spec)
    order: list[str] = []
    inner = fetcher(weights, lines)

    def fetch(name: str) -> Packed:
        order.append(name)
        return inner(name)

    container.write(WriteRequest(tmp_path / "m.gguf", spec, lines, fetch, source=moe, options=PLAIN))
    stacked: list[str] = []
    for line in lines:
        if line.spec.gguf not in stacked:
            stacked.append(line.spec.gguf)
    by_name = {line.spec.name: line.spec.gguf for line in lines}
    assert sorted(order) == sorted(weights)
    assert list(dict.fromkeys(by_name[name] for name in order)) == stacked


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writing_leaves_nothing(error: type[BaseException], moe: Path, tmp_path: Path) -> None:
    spec, weights = spec_of(moe), weights_of(moe)
    lines = plan(spec)
    inner = fetcher(weights, lines)
    target = tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    target.write_bytes(b"an earlier file")

    def fetch(name: str) -> Packed:
        if name == "model.norm.weight":
            raise error
        return inner(name)

    with pytest.raises(error):
        container.write(WriteRequest(target, spec, lines, fetch, source=moe))
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]
    assert target.read_bytes() == b"an earlier file"


def test_disk_full_is_one_line(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.containers._atomic._free", lambda folder: 12_345_678)
    with pytest.raises(OutputError, match=r"needs \d+\.\d MB and 12\.3 MB are free") as caught:
        write(moe, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing(moe: Path, tmp_path: Path) -> None:
    """A write that fails half-way (here: the file size limit) is an OutputError too and leaves nothing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            write(moe, tmp_path / "m.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_impossible_plans_are_refused(moe: Path, tmp_path: Path) -> None:
    spec, weights = spec_of(moe), weights_of(moe)
    lines = plan(spec)
    fetch = fetcher(weights, lines)

    def attempt(changed: list[Planned]) -> None:
        container.write(WriteRequest(tmp_path / "m.gguf", spec, changed, fetch, source=moe, options=PLAIN))

    with pytest.raises(OutputError, match="1-D"):
        attempt([Planned(p.spec, "f16" if p.spec.role == "norms" else p.codec) for p in lines])
    with pytest.raises(OutputError, match="router"):
        attempt([Planned(p.spec, "q8_0" if p.spec.role == "router" else p.codec) for p in lines])
    with pytest.raises(OutputError, match="one codec"):
        attempt([Planned(p.spec, "f16" if p.spec.expert == 3 else p.codec) for p in lines])
    with pytest.raises(OutputError, match="all 6 experts"):
        attempt([p for p in lines if p.spec.expert != 3])
    with pytest.raises(OutputError, match="arrived as f32"):
        attempt([Planned(p.spec, "f16" if p.spec.role == "embeddings" else p.codec) for p in lines])
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(moe: Path, tmp_path: Path) -> None:
    (file,) = write(moe, tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        container.inventory(file)
    with pytest.raises(CheckpointError, match="no GGUF file"):
        container.inventory(tmp_path / "absent.gguf")


# --- the tokenizer ----------------------------------------------------------------------------------------------------

TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple) ✅ 🦙🦙 3 33 333 3333 33333 3.3 3..3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL Über McDonald's"
)


def _tokens(model: Path, target: Path, text: str) -> tuple[list[int], list[int]]:
    pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer

    from compress.engines.llama_cpp import LlamaCpp

    expected = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    with LlamaCpp(write(model, target, tokenizer=True)[0], threads=1) as engine:
        return engine.tokenize(text).tolist(), expected


def _split(*patterns: str, digits: bool = False) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    middle = [_DIGITS] if digits else []
    return {"type": "Sequence", "pretokenizers": [*splits, *middle, {**_BYTES, "use_regex": False}]}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {
    "qwen2": _split(pre_tokenizers.QWEN2), "qwen35": _split(pre_tokenizers.QWEN35),
    "llama-bpe": _split(pre_tokenizers.LLAMA3), "smaug-bpe": _split(pre_tokenizers.LLAMA3),
    "tekken": _split(pre_tokenizers.TEKKEN), "deepseek-v3": _split(*pre_tokenizers.DEEPSEEK_V3),
    "deepseek-llm": _split(*pre_tokenizers.DEEPSEEK_LLM, digits=True), "gpt-2": _BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]},
}  # fmt: skip


def _byte_level(folder: Path, pre_tokenizer: dict[str, Any], **model: Any) -> Path:
    """A byte-level tokenizer trained on text that tells pre-tokenizers apart: what they cut nowhere becomes one token."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    bare = json.loads(Tokenizer(models.BPE()).to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**bare, "pre_tokenizer": pre_tokenizer}))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<|e|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, *TEXTS] * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"] |= model
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|e|>"}))
    return folder


@pytest.mark.parametrize("pre", list(_PRE_TOKENIZERS))
def test_llama_cpp_splits_text_as_the_tokenizer_does(pre: str, tmp_path: Path) -> None:
    """Each known pre-tokenizer tokenizes alike on both sides, and unlike most others, or nothing would be shown."""
    pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer

    from compress.containers._gguf_tokenizer import read_vocabulary
    from compress.engines.llama_cpp import LlamaCpp

    model = _byte_level(tmp_path / "m", _PRE_TOKENIZERS[pre], ignore_merges=pre in ("llama-bpe", "tekken"))
    assert read_vocabulary(model, {}, 2000).pre == pre
    spec = load_spec(tiny_config("llama", vocab_size=2000))
    container.write_vocabulary(tmp_path / "v.gguf", model, spec)
    reference = Tokenizer.from_file(str(model / "tokenizer.json"))
    with LlamaCpp(tmp_path / "v.gguf", vocabulary_only=True) as engine:
        for text in (TEXT, *TEXTS):
            if pre == "tekken":  # llama.cpp's knows no combining marks
                text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))
            assert engine.tokenize(text).tolist() == reference.encode(text, add_special_tokens=False).ids, text


def test_demo_tokenizer_and_metadata(tmp_path: Path) -> None:
    fields, _ = read_gguf(write(demo_model(), tmp_path / "demo.gguf", tokenizer=True)[0])
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.tokens"][4093:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert fields["tokenizer.ggml.token_type"][4092:] == [1, 3, 3, 3]
    assert fields["tokenizer.ggml.eos_token_id"] == 4093
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>" in fields["tokenizer.chat_template"]
    assert fields["qwen3moe.expert_count"] == 12 and fields["qwen3moe.expert_used_count"] == 2
    assert fields["general.name"] == "tiny-qwen3-moe"


def test_every_chat_template_of_the_folder_goes_along(tmp_path: Path) -> None:
    """Those beside the main one, under the names by which gguf's writer and llama.cpp know them."""
    model = tiny_model("llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text("main")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    fields, _ = read_gguf(write(model, tmp_path / "m.gguf", tokenizer=True)[0])
    assert fields["tokenizer.chat_template"] == "main" and fields["tokenizer.chat_template.tool_use"] == "tools"
    assert fields["tokenizer.chat_templates"] == ["tool_use"]


def _sentencepiece(folder: Path) -> tuple[list[tuple[str, float, int]], dict[str, Any]]:
    """A small SentencePiece-like BPE (byte fallback, ▁ for spaces): pieces and their tokenizer.json, as transformers
    converts them: merges ordered by the score of what they make."""
    words = [
        "▁the",
        "▁th",
        "he",
        "th",
        "▁t",
        "▁a",
        "in",
        "er",
        "▁w",
        "re",
        "▁wa",
        "▁water",
        "ter",
        "te",
        "at",
    ]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [(letter, -float(len(words) + rank), 1) for rank, letter in enumerate(letters)]
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, _ in pieces}
    merges = [
        (scores[word], [word[:cut], word[cut:]])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    merges.sort(key=lambda item: -item[0])
    special = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(("<unk>", "<s>", "</s>"))
    ]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [pair for _, pair in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return pieces, data


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _sentencepiece_file(pieces: list[tuple[str, float, int]]) -> bytes:
    import struct

    def field(number: int, data: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(data)) + data

    out = b""
    for text, score, kind in pieces:
        out += field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
    return out + field(2, b"\x18\x02")  # trainer_spec.model_type = BPE


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    """tokenizer.json with byte fallback, and SentencePiece's own file, both become llama.cpp's `llama` vocabulary."""
    pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer

    from compress.containers._gguf_tokenizer import read_vocabulary
    from compress.engines.llama_cpp import LlamaCpp

    model = tiny_model("llama", tmp_path / "model", bos_token_id=1, eos_token_id=2)
    pieces, _ = _sentencepiece(model)
    from_json = read_vocabulary(model, {}, 4096)
    assert (from_json.model, from_json.add_bos, from_json.add_space_prefix) == ("llama", True, True)
    text = "the water there in a wet heater, Über 東京 taste"
    reference = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain, whole = (reference.encode(text, add_special_tokens=flag).ids for flag in (False, True))
    with LlamaCpp(write(model, tmp_path / "m.gguf", tokenizer=True)[0], threads=1) as engine:
        assert engine.tokenize(text).tolist() == plain
        assert engine.tokenize(text, special=True).tolist() == whole
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(_sentencepiece_file(pieces))
    with LlamaCpp(write(model, tmp_path / "n.gguf", tokenizer=True)[0], threads=1) as engine:
        assert engine.tokenize(text).tolist() == plain
        assert engine.tokenize(text, special=True).tolist() == whole
    (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff junk")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        read_vocabulary(model, {}, 4096)


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    path = model / "tokenizer.json"
    original = json.loads(path.read_text())

    def attempt(**changes: Any) -> None:
        path.write_text(json.dumps({**original, **changes}))
        write(model, tmp_path / "m.gguf", tokenizer=True)

    with pytest.raises(UnsupportedModel, match="pre-tokenizer is unknown"):
        attempt(pre_tokenizer=_split(r"\w+|\W+"))
    with pytest.raises(UnsupportedModel, match="'Lowercase'"):
        attempt(normalizer={"type": "Lowercase"})
    with pytest.raises(UnsupportedModel, match="'Unigram'"):
        attempt(model={"type": "Unigram", "vocab": []})
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        attempt(model={**original["model"], "vocab": {**original["model"]["vocab"], "the river": 5000}})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer\.json nor"):
        write(model, tmp_path / "m.gguf", tokenizer=True)
    assert not list(tmp_path.glob("*m.gguf*"))


# --- llama.cpp as an engine -------------------------------------------------------------------------------------------


def test_engine_sequences_are_independent_and_long_ones_are_cut_into_batches(moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    (file,) = write(moe, tmp_path / "m.gguf")
    sequences = [token_ids(600, 3) % 4000, token_ids(9, 4)]
    with LlamaCpp(file, threads=1) as engine:
        long, short = engine.logits(sequences)
        (alone,) = engine.logits(sequences[1:])
        np.testing.assert_array_equal(short, alone)
        assert engine.vocab_size == 4096
        for count in (1, 80, 100, 600):  # 88 are in the last batch
            (tail,) = engine.tails(sequences[:1], [count])
            np.testing.assert_allclose(tail, long[-count:], atol=1e-4)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            list(engine.logits([np.array([4096])]))
    expected = reference_logits(moe, sequences[0])
    assert long.shape == (600, 4096)
    assert np.abs(long - expected).max() < TOLERANCE * expected.std()


def test_generation_is_greedy_decoding(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from compress.engines.llama_cpp import LlamaCpp

    (file,) = write(demo_model(), tmp_path / "demo.gguf", tokenizer=True)
    tokenizer = Tokenizer.from_file(str(demo_model() / "tokenizer.json"))
    prompt = "The river Thames is"
    ids = tokenizer.encode(prompt).ids
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    with LlamaCpp(file, threads=1) as engine:
        assert engine.generate(prompt, 12) == tokenizer.decode(out.tolist())
        assert engine.continuation(np.array(ids), 12, lambda produced: len(produced) == 5) == out[:5].tolist()
        assert engine.detokenize(ids) == prompt


def test_llama_quantize_uses_the_given_importance_and_types(tmp_path: Path) -> None:
    """llama_model_quantize through our structs writes the bytes that ggml_quantize_chunk writes."""
    pytest.importorskip("llama_cpp")
    import gguf

    from compress.engines import ggml
    from compress.engines.llama_cpp import LlamaCpp
    from compress.errors import CompressError

    model = tiny_model("qwen3_moe", tmp_path / "model", hidden_size=256, moe_intermediate_size=256, num_experts=3)
    (source,) = write(model, tmp_path / "f32.gguf")
    generator = np.random.default_rng(0)
    experts = {n: s for n, (_, s) in container.inventory(source).items() if n.endswith("_exps.weight")}
    importance = {n: (generator.random((s[0], s[2])) + 0.1).astype(np.float32) for n, s in experts.items()}
    types = {n: "q2_k" if "down" in n else "iq2_xxs" for n in experts} | {"token_embd.weight": "q4_0"}
    target = tmp_path / "small.gguf"
    ggml.quantize(source, target, "q8_0", imatrix=importance, tensor_types=types, threads=1)
    stored = container.inventory(target)
    assert {name: stored[name][0] for name in types} == types
    assert stored["blk.0.attn_q.weight"][0] == "q8_0"
    floats = {t.name: t for t in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(target).tensors:
        if tensor.name in experts and tensor.name.startswith("blk.0."):
            rows = np.asarray(floats[tensor.name].data)
            expected = [
                ggml.quantize_rows(types[tensor.name], matrix, weight)
                for matrix, weight in zip(rows, importance[tensor.name], strict=True)
            ]
            np.testing.assert_array_equal(np.asarray(tensor.data).reshape(-1), np.stack(expected).reshape(-1))
    with pytest.raises(CompressError, match="importance matrix"):
        ggml.quantize(source, tmp_path / "no.gguf", "iq2_xxs", threads=1)
    with pytest.raises(CheckpointError, match="cannot load"):
        (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(100))
        LlamaCpp(tmp_path / "junk.gguf")


def test_planning_functions_need_no_torch() -> None:
    code = (
        "import sys; from compress.containers import gguf, gptq, safetensors; from compress.models import load_spec; "
        "spec = load_spec({'model_type': 'qwen3_moe', 'hidden_size': 64, 'num_hidden_layers': 2, 'vocab_size': 9, "
        "'num_attention_heads': 4, 'intermediate_size': 64, 'norm_topk_prob': False}); "
        "assert gguf.check_representable(spec); gguf.codec_problem(spec.tensors()[0], 'q8_0'); "
        "assert not {'torch', 'numpy', 'gguf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_too_many_experts_and_longrope_are_reasons() -> None:
    base = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 64,
        "num_attention_heads": 4, "norm_topk_prob": True,
    }  # fmt: skip
    assert container.check_representable(load_spec({**base, "num_experts": 128})) == []
    assert "512" in container.check_representable(load_spec({**base, "num_experts": 640}))[0]
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512, **factors}
    assert "longrope" in container.check_representable(load_spec({**base, "rope_scaling": rope}))[0]
