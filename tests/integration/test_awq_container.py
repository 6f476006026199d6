"""AWQ folders: bytes against AutoAWQ's packing loop written down from its format, values against the packed codes.

Checked by hand: WQLinear_GEMM.from_linear of autoawq 0.2.9 packs the same bytes, and gptqmodel 7.6.0 on the CPU (float16)
loads Llama, Qwen2, Qwen2-MoE and Qwen3-MoE, also with attention, MLP or experts in float, and agrees in logits to
float16's accuracy. Mixtral it looks for under transformers' new names and does not find.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.codecs import block_codec
from compress.containers import awq, safetensors
from compress.containers.base import Options, WriteRequest
from compress.errors import CheckpointError, OutputError
from compress.models import ModelSpec, TensorSpec
from compress.plan.tensor import PlannedTensor
from compress.weights import Packed
from tests.integration.containers import spec_of, token_ids, uniform_packed, weights_of
from tests.tiny import tiny_model

KEPT = ("embeddings", "norms", "router", "biases", "lm_head")
Choice = Callable[[TensorSpec], str]


def planned(spec: ModelSpec, choice: Choice) -> list[PlannedTensor]:
    return [PlannedTensor(t, "f16" if len(t.shape) == 1 else choice(t), None, 0) for t in spec.tensors()]


def usual(codec: str, floats: str = "none") -> Choice:
    """`codec` for all linears but the head, routers and roles that start with `floats`."""
    return lambda tensor: "f16" if tensor.role in KEPT or tensor.role.startswith(floats) else codec


def fetcher(folder: Path, plan: list[PlannedTensor]) -> Callable[[str], Packed]:
    weights = weights_of(folder)
    packs = {
        line.name: Packed("f16", line.spec.shape, {"values": weights[line.name].half()})
        if line.codec == "f16"
        else uniform_packed(line.codec, line.spec.shape, seed)
        for seed, line in enumerate(plan)
    }
    return packs.__getitem__


def autoawq_pack(values: np.ndarray) -> np.ndarray:
    """AutoAWQ's loop: integers [n, out] -> int32 [n, out / 8], the i-th nibble of a word from output order_map[i]."""
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
    for col in range(words.shape[1]):
        for i in range(8):
            words[:, col] |= values[:, col * 8 + order_map[i]].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def test_the_layout_by_hand() -> None:
    """Outputs 0 to 7 with the codes 0 to 7: the even ones fill the lower half of the word."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32)
    zeros = torch.full((8, 1), 8, dtype=torch.uint8)
    packed = Packed("int4-g32", (8, 32), {"codes": codes, "scales": torch.ones(8, 1).half(), "zeros": zeros})
    line = PlannedTensor(TensorSpec("m.weight", (8, 32), "mlp.up", 0, None, "", "mlp.in"), "int4-g32", None, 0)
    stored = awq._encode(packed, line)
    assert {f"{word & 0xFFFFFFFF:08x}" for word in stored["m.qweight"].flatten().tolist()} == {"75316420"}
    assert [f"{word & 0xFFFFFFFF:08x}" for word in stored["m.qzeros"].flatten().tolist()] == ["88888888"]


@pytest.mark.parametrize("codec", ["int4-g32-asym", "int4-g64", "int4-g128-asym"])
def test_every_code_survives(codec: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tmp_path / "model", hidden_size=128, intermediate_size=256)
    spec = spec_of(model)
    plan = planned(spec, usual(codec))
    fetch = fetcher(model, plan)
    options = Options(max_shard_size=900_000)
    files = awq.write(
        WriteRequest(
            tmp_path / "out", spec, plan, fetch, source=model, options=options, provenance={"compress.recipe": "test"}
        )
    )
    assert len(files) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    load = awq.CONTAINER.open_dense(files, spec)
    for line in plan:
        packed = fetch(line.name)
        if line.codec == "f16":
            assert torch.equal(stored[line.name], packed.parts["values"])
            assert torch.equal(load(line.name), packed.parts["values"].float())
            continue
        module = line.name.removesuffix(".weight")
        codes, scales, zeros = (packed.parts[key].T.numpy() for key in ("codes", "scales", "zeros"))
        np.testing.assert_array_equal(stored[f"{module}.qweight"], autoawq_pack(codes))
        np.testing.assert_array_equal(stored[f"{module}.qzeros"], autoawq_pack(zeros))
        np.testing.assert_array_equal(stored[f"{module}.scales"], scales)
        assert torch.equal(load(line.name), block_codec(codec, line.spec.shape[1]).unpack(packed)), line.name
        assert line.name not in stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"].pop("meta")
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": int(codec.split("-")[1][1:]),
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert config["dtype"] == "float16"
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == {"compress.recipe": "test"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    wider = spec_of(tiny_model("qwen2", tmp_path / "wide", hidden_size=128, num_key_value_heads=4, tokenizer=False))
    with pytest.raises(CheckpointError, match="does not fit"):
        awq.CONTAINER.open_dense(files, wider)("model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize("floats", ["routed", "attention", "none"])
def test_what_stays_float_is_listed(floats: str, tmp_path: Path) -> None:
    """By vLLM's rule (a part of the module's name, fused experts by their prefix) and gptqmodel's (`dynamic`)."""
    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=12, tokenizer=False))
    plan = planned(spec, usual("int4-g32-asym", floats))
    config = awq.quantization_config(plan)
    for line in plan:
        if len(line.spec.shape) != 2 or line.spec.role == "embeddings":
            continue
        module = line.name.removesuffix(".weight")
        fused = module.split(".experts.")[0] + ".experts" if line.spec.expert is not None else module
        assert any(key in fused for key in config["modules_to_not_convert"]) == (line.codec == "f16"), module
        found = [rule for rule in config["dynamic"] if re.match(rule.removeprefix("-:"), module)]
        assert len(found) == (line.codec == "f16" and line.spec.role != "lm_head"), module


def by_projection(tensor: TensorSpec) -> str:
    return "f16" if tensor.role == "attention.v" else usual("int4-g32")(tensor)


def by_expert(tensor: TensorSpec) -> str:
    return "f16" if tensor.role == "routed_experts.down" else usual("int4-g32")(tensor)


def two_groups(tensor: TensorSpec) -> str:
    return "int4-g64" if tensor.role.startswith("attention") else usual("int4-g32")(tensor)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (usual("int3-g32"), "not int3-g32; use container gptq"),
        (usual("int4-row"), "not int4-row; use int4-g128-asym"),
        (usual("q4_k"), "hold int4 in groups"),
        (lambda tensor: "f16" if tensor.role == "embeddings" else "int4-g32", "keep router in float"),
        (lambda tensor: "int4-g32" if tensor.role == "lm_head" else "f16", "keep lm_head in float"),
        (usual("int4-g128"), "whole groups of 128 columns; use a smaller"),
        (usual("f16"), "nothing in this plan"),
        (two_groups, "one group size, this plan has 32 .* 64"),
        (by_projection, "fuses q, k and v .* give them the same codec"),
        (by_expert, "fuses the routed experts of a layer"),
    ],
)
def test_refused_plans_name_the_fix(choice: Choice, reason: str, tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model", tokenizer=False))
    with pytest.raises(OutputError, match=reason):
        awq.check_plan(spec, planned(spec, choice))


def test_activations_have_no_place(tmp_path: Path) -> None:
    spec = spec_of(tiny_model("llama", tmp_path / "model", tokenizer=False))
    plan = [PlannedTensor(line.spec, line.codec, None, 0, activations="int8") for line in planned(spec, usual("f16"))]
    with pytest.raises(OutputError, match="nothing about activations"):
        awq.check_plan(spec, plan)


@pytest.mark.parametrize(
    ("family", "choice"),
    [
        ("llama", usual("int4-g32-asym")),
        ("qwen3_moe", usual("int4-g32")),
        ("qwen3_moe", usual("int4-g32-asym", "routed")),
        ("qwen2_moe", usual("int4-g32-asym", "attention")),
    ],
    ids=["llama", "experts", "float experts", "float attention"],
)
def test_gptqmodel_loads_the_folder(family: str, choice: Choice, tmp_path: Path) -> None:
    """The maintained loader computes what the decoded weights compute in the same float16 arithmetic."""
    loader = pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, tmp_path / "model")
    spec = spec_of(model)
    plan = planned(spec, choice)
    fetch = fetcher(model, plan)
    awq.write(WriteRequest(tmp_path / "awq", spec, plan, fetch, source=model))
    options = Options(dtype="f16")
    safetensors.write(WriteRequest(tmp_path / "dense", spec, plan, fetch, source=model, options=options))
    ids = torch.from_numpy(token_ids())[None]
    loaded = loader.GPTQModel.load(
        str(tmp_path / "awq"), device="cpu", backend=loader.BACKEND.TORCH_AWQ, dtype=torch.float16
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16).eval()
    with torch.no_grad():
        got, expected = (m(ids).logits.float() for m in (loaded.model, dense))
    assert (got - expected).abs().max() < 0.05 * expected.std()
