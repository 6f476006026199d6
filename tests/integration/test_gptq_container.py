"""GPTQ and dense safetensors folders: bytes against a transcription of AutoGPTQ's packing loop, values and logits
against the decoded weights.

Checked by hand with gptqmodel 7.6.0 on the CPU (float16 arithmetic, TorchLinear): every combination of Llama and
Qwen3-MoE with int2/3/4/8, symmetric and asymmetric, loads and agrees in logits to float16's accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.codecs import get_codec
from compress.containers import gptq, safetensors
from compress.containers.base import Options, WriteRequest
from compress.errors import CheckpointError, OutputError
from compress.models.checkpoint import Checkpoint
from compress.models.sources.arithmetic import unpacked
from compress.weights import Packed
from tests.integration.containers import (
    Planned,
    fetcher,
    plan,
    reference_logits,
    spec_of,
    token_ids,
    weights_of,
)
from tests.tiny import tiny_model


def round_to_nearest(name: str, weight: torch.Tensor) -> Packed:
    """Plain min-max rounding, enough to fill every code."""
    form = gptq.parse_codec(name)
    assert form is not None
    rows, columns = weight.shape
    group = columns if form.group == -1 else form.group
    grouped, top = weight.float().reshape(rows, -1, group), 2**form.bits - 1
    if form.symmetric:
        scales = (grouped.abs().amax(2) / (2 ** (form.bits - 1))).half()
        zeros = torch.full_like(scales, 2 ** (form.bits - 1)).float()
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(0, top)
        zeros[::3] = 0  # the zero point that format v1 cannot hold
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return Packed(
        name,
        (rows, columns),
        {
            "codes": codes.reshape(rows, columns).to(torch.uint8),
            "scales": scales,
            "zeros": zeros.to(torch.uint8),
        },
    )


def decoded(packed: Packed, group: int) -> torch.Tensor:
    codes, scales, zeros = (packed.parts[key].float() for key in ("codes", "scales", "zeros"))
    index = torch.arange(packed.shape[1]) // (packed.shape[1] if group == -1 else group)
    return (codes - zeros[:, index]) * scales[:, index]


def autogptq_pack(values: np.ndarray, bits: int) -> np.ndarray:
    """AutoGPTQ's loop over words (qlinear_cuda_old.py), for uint8 [n, m]."""
    source = values.astype(np.uint32)
    out = np.zeros((len(values) // 32 * bits, values.shape[1]), dtype=np.uint32)
    i = row = 0
    while row < len(out):
        if bits != 3:
            for j in range(i, i + 32 // bits):
                out[row] |= source[j] << (bits * (j - i))
            i, row = i + 32 // bits, row + 1
            continue
        for offset, split, mask in ((0, 2, 1), (1, 1, 3), (2, 0, 0)):
            for j in range(i, i + 10):
                out[row] |= source[j] << (3 * (j - i) + offset)
            i += 10
            if mask:
                out[row] |= source[i] << (30 if split == 2 else 31)
                out[row + 1] |= (source[i] >> split) & mask
                i += 1
            row += 1
    return out.view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_autogptqs(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (96, 7)).astype(np.uint8)
    words = gptq.pack_words(values, bits)
    np.testing.assert_array_equal(words, autogptq_pack(values, bits))
    np.testing.assert_array_equal(unpacked(torch.from_numpy(words).T, bits, 96).numpy().T, values)


def test_the_layout_by_hand() -> None:
    """One 4-bit column of codes 0..15, 0..15 and its zero point 8, stored as 7."""
    codes = (np.arange(32) % 16).astype(np.uint8)[:, None]
    assert [f"{word & 0xFFFFFFFF:08x}" for word in gptq.pack_words(codes, 4)[:, 0].tolist()] == [
        "76543210", "fedcba98", "76543210", "fedcba98",
    ]  # fmt: skip


CODECS = ["int4-g32", "int3-g64", "int2-g32", "int8-row", "int4-row-asym", "int3-g32-asym", "int4-g128"]


@pytest.mark.parametrize("codec", CODECS)
def test_every_code_survives(codec: str, tmp_path: Path) -> None:
    """The folder decodes to exactly the values of the packed codes, and its logits are those of the dense ones."""
    model = tiny_model("llama", tmp_path / "model", intermediate_size=128, attention_bias=True)
    spec, weights = spec_of(model), weights_of(model)
    form = gptq.parse_codec(codec)
    assert form is not None
    floats = ("embeddings", "lm_head", "norms", "biases")
    usable = [t for t in spec.tensors() if t.role not in floats and (form.group == -1 or t.shape[1] % form.group == 0)]
    chosen = {t.name for t in usable}
    lines = [Planned(t, codec if t.name in chosen else "f32") for t in spec.tensors()]
    packs = {name: round_to_nearest(codec, weights[name]) for name in chosen}
    plain = fetcher(weights, [Planned(t, "f32") for t in spec.tensors()])
    files = gptq.write(
        WriteRequest(
            tmp_path / "out",
            spec,
            lines,
            lambda name: packs[name] if name in chosen else plain(name),
            source=model,
            options=Options(max_shard_size=600_000),
            provenance={"compress.recipe": "test"},
        )
    )
    assert len(files) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    dense = gptq.load_dense(tmp_path / "out", spec)
    for name, weight in weights.items():
        expected = decoded(packs[name], form.group) if name in chosen else weight
        assert torch.equal(dense[name], expected), name
        if name in chosen and packs[name].shape[1] % (form.group if form.group > 0 else 1) == 0:
            assert torch.equal(get_codec(codec).unpack(packs[name]), expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (form.bits, form.group, form.symmetric)
    assert config["checkpoint_format"] == ("gptq" if form.symmetric else "gptq_v2")
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == {"compress.recipe": "test"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_tensors_of_one_module(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path / "model")
    spec, weights = spec_of(model), weights_of(model)
    lines = [Planned(t, "int4-g32" if t.role.startswith(("routed", "attention")) else "bf16") for t in spec.tensors()]
    floats = fetcher(weights, lines[:1] + [p for p in lines if p.codec == "bf16"])

    def fetch(name: str) -> Packed:
        quantized = next(p.codec for p in lines if p.spec.name == name) != "bf16"
        return round_to_nearest("int4-g32", weights[name]) if quantized else floats(name)

    (file,) = gptq.write(WriteRequest(tmp_path / "out", spec, lines, fetch, source=model))
    stored = load_file(file)  # the reference reader accepts the file
    module = "model.layers.1.mlp.experts.5.down_proj"  # 64 x 32
    shapes = {key: tuple(stored[f"{module}.{key}"].shape) for key in ("qweight", "qzeros", "scales", "g_idx")}
    assert shapes == {"qweight": (4, 64), "qzeros": (1, 8), "scales": (1, 64), "g_idx": (32,)}
    assert stored[f"{module}.scales"].dtype == torch.float16
    assert set(stored[f"{module}.qzeros"].flatten().tolist()) == {0x77777777}
    up = stored["model.layers.0.mlp.experts.0.up_proj.g_idx"].tolist()
    assert up == [0] * 32 + [1] * 32
    assert f"{module}.weight" not in stored and stored["model.norm.weight"].dtype == torch.bfloat16
    config = json.loads((file.parent / "config.json").read_text())
    assert config["quantization_config"]["dynamic"] == {r"-:^model\.layers\.\d+\.mlp\.gate$": {}}
    assert config["dtype"] == "bfloat16"
    assert gptq.load_dense([file], spec)["model.norm.weight"].dtype == torch.float32


def test_mixed_formats_become_dynamic_rules(tmp_path: Path) -> None:
    import re

    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model"))

    def codec(tensor: object) -> str:
        role, layer = tensor.role, tensor.layer  # type: ignore[attr-defined]
        if role == "routed_experts.down":
            return "int8-g64" if layer == 1 else "int4-g32"
        return "int4-g32" if role.startswith(("routed", "attention")) else "f16"

    lines = [Planned(t, codec(t)) for t in spec.tensors()]
    config = gptq.quantization_config(lines)
    assert (config["bits"], config["group_size"]) == (4, 32)
    for line in lines:
        if len(line.spec.shape) != 2 or line.spec.role in ("embeddings", "lm_head"):
            continue
        module = line.spec.name.removesuffix(".weight")
        found = [(rule[:2], value) for rule, value in config["dynamic"].items() if re.match(rule[2:], module)]
        expected = {
            "f16": [("-:", {})],
            "int4-g32": [],
            "int8-g64": [("+:", {"bits": 8, "group_size": 64})],
        }[line.codec]
        assert found == expected, module
    with pytest.raises(OutputError, match="nothing in this plan"):
        gptq.quantization_config([Planned(t, "f16") for t in spec.tensors()])
    mixed = [Planned(p.spec, "int4-g32-asym" if p.spec.role == "attention.q" else p.codec) for p in lines]
    with pytest.raises(OutputError, match="throughout"):
        gptq.quantization_config(mixed)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model", hidden_size=72, moe_intermediate_size=40))
    by_role = {tensor.role: tensor for tensor in spec.tensors()}
    assert "packs 32" in (gptq.codec_problem(by_role["routed_experts.up"], "int4-g32") or "")
    assert "in float" in (gptq.codec_problem(by_role["router"], "int4-g32") or "")
    assert "in float" in (gptq.codec_problem(by_role["embeddings"], "int8-row") or "")
    assert "not q4_k" in (gptq.codec_problem(by_role["routed_experts.up"], "q4_k") or "")
    assert gptq.codec_problem(by_role["norms"], "f16") is None


def test_nothing_partial_and_nothing_overwritten(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    spec, weights = spec_of(model), weights_of(model)
    lines = plan(spec)
    inner = fetcher(weights, lines)

    def fetch(name: str) -> Packed:
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return inner(name)

    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        safetensors.write(WriteRequest(target, spec, lines, fetch, source=model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        safetensors.write(WriteRequest(target, spec, lines, inner, source=model))
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    options = Options(replace=True)
    safetensors.write(WriteRequest(target, spec, lines, inner, source=model, options=options))
    assert (target / "config.json").is_file() and not (target / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    (target / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        gptq.load_dense(target, spec)


@pytest.mark.parametrize(("dtype", "shard"), [("f32", 200_000), ("bf16", 10**9), ("f16", 10**9)])
def test_dense_folder_is_the_model(dtype: str, shard: int, tmp_path: Path) -> None:
    """Decoded weights, loadable by transformers; in f32 the logits are exactly the original's."""
    model = tiny_model("qwen2_moe", tmp_path / "model", hidden_size=72, num_attention_heads=3, num_key_value_heads=3)
    spec, weights = spec_of(model), weights_of(model)
    lines = plan(spec)
    options = Options(dtype=dtype, max_shard_size=shard)
    files = safetensors.write(
        WriteRequest(tmp_path / "out", spec, lines, fetcher(weights, lines), source=model, options=options)
    )
    assert (len(files) > 1) == (shard < 10**9)
    checkpoint = Checkpoint.open(tmp_path / "out")
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert set(checkpoint.entries) == set(weights)
    assert all(torch.equal(checkpoint.load(name), weight.to(kind)) for name, weight in weights.items())
    ids = token_ids()
    logits, expected = reference_logits(tmp_path / "out", ids), reference_logits(model, ids)
    if dtype == "f32":
        np.testing.assert_array_equal(logits, expected)
    else:
        assert np.abs(logits - expected).mean() < 0.05 * expected.std()


@pytest.mark.parametrize(
    ("family", "codec"), [("llama", "int4-g32"), ("qwen3_moe", "int4-g32"), ("llama", "int3-g32-asym")]
)
def test_gptqmodel_loads_the_folder(family: str, codec: str, tmp_path: Path) -> None:
    """The maintained loader computes what the decoded weights compute in the same float16 arithmetic."""
    loader = pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, tmp_path / "model")
    spec, weights = spec_of(model), weights_of(model)
    keep = ("embeddings", "lm_head", "norms", "router")
    lines = [Planned(t, "f16" if t.role in keep else codec) for t in spec.tensors()]
    kinds = {line.spec.name: line.codec for line in lines}

    def fetch(name: str) -> Packed:
        if kinds[name] == codec:
            return round_to_nearest(codec, weights[name])
        return Packed("f16", tuple(weights[name].shape), {"values": weights[name].half()})

    gptq.write(WriteRequest(tmp_path / "gptq", spec, lines, fetch, source=model))
    options = Options(dtype="f16")
    safetensors.write(WriteRequest(tmp_path / "dense", spec, lines, fetch, source=model, options=options))
    ids = torch.from_numpy(token_ids())[None]
    loaded = loader.GPTQModel.load(
        str(tmp_path / "gptq"), device="cpu", backend=loader.BACKEND.TORCH, dtype=torch.float16
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16).eval()
    with torch.no_grad():
        got, expected = (m(ids).logits.float() for m in (loaded.model, dense))
    assert (got - expected).abs().max() < 0.02 * expected.std()
