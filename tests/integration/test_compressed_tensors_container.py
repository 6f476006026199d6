"""compressed-tensors folders: bytes against the package's own decompressors, logits in transformers against the decoded
weights, and what transformers and vLLM would load wrongly.

W8A8 reference: the dense model with every linear's input rounded, per token, to integers in steps of max / 127.5.
Bytes of vLLM are not run here; its rules for names and fused linears are those of its compressed_tensors package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from compress.codecs import block_codec
from compress.containers import compressed_tensors, safetensors
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
    """The plan of a choice: "int8-row+int8" means int8 inputs, too; vectors are f16."""
    out = []
    for tensor in spec.tensors():
        codec, _, activations = ("f16" if len(tensor.shape) == 1 else choice(tensor)).partition("+")
        out.append(PlannedTensor(tensor, codec, None, 0, activations=activations or None))
    return out


def usual(codec: str, experts: str | None = None) -> Choice:
    """`codec` for all linears but the head and routers, `experts` for routed experts."""

    def choice(tensor: TensorSpec) -> str:
        if tensor.role in KEPT:
            return "f16"
        return experts if experts and tensor.role.startswith("routed") else codec

    return choice


def fetcher(folder: Path, plan: list[PlannedTensor]) -> Callable[[str], Packed]:
    weights = weights_of(folder)
    packs = {
        line.name: Packed("f16", line.spec.shape, {"values": weights[line.name].half()})
        if line.codec == "f16"
        else uniform_packed(line.codec, line.spec.shape, seed)
        for seed, line in enumerate(plan)
    }
    return packs.__getitem__


def decoded(packed: Packed) -> torch.Tensor:
    if packed.codec == "f16":
        return packed.parts["values"].float()
    return block_codec(packed.codec, packed.shape[1]).unpack(packed)


def written(model: Path, folder: Path, choice: Choice) -> tuple[Path, Path]:
    """A compressed-tensors folder and the dense folder of what its weights stand for."""
    spec = spec_of(model)
    plan = planned(spec, choice)
    fetch = fetcher(model, plan)
    compressed_tensors.write(WriteRequest(folder / "packed", spec, plan, fetch, source=model))
    floats = [PlannedTensor(line.spec, "f32", None, 0) for line in plan]

    def dense(name: str) -> Packed:
        values = decoded(fetch(name))
        return Packed("f32", tuple(values.shape), {"values": values})

    options = Options(dtype="f32")
    safetensors.write(WriteRequest(folder / "dense", spec, floats, dense, source=model, options=options))
    return folder / "packed", folder / "dense"


CODECS = ["int4-g32", "int4-g64-asym", "int4-row", "int4-row-asym", "int8-g32-asym", "int8-row", "int8-row+int8"]


@pytest.mark.parametrize("codec", CODECS)
def test_the_package_decodes_every_value(codec: str, tmp_path: Path) -> None:
    """The whole range of codes, -128 included, comes back exactly, from the package and from our reader."""
    model = tiny_model("llama", tmp_path / "model", intermediate_size=128, attention_bias=True)
    spec = spec_of(model)
    plan = planned(spec, usual(codec))
    fetch = fetcher(model, plan)
    options = Options(max_shard_size=400_000)
    files = compressed_tensors.write(
        WriteRequest(
            tmp_path / "out", spec, plan, fetch, source=model, options=options, provenance={"compress.recipe": "test"}
        )
    )
    assert len(files) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(settings).config_groups.values()
    reader = BaseCompressor.get_value_from_registry(scheme.format)
    load = compressed_tensors.CONTAINER.open_dense(files, spec)
    lowest = 0.0
    for line in plan:
        values = decoded(fetch(line.name))
        assert torch.equal(load(line.name), values), line.name
        if line.codec == "f16":
            assert torch.equal(stored[line.name], values.half())
            continue
        module = line.name.removesuffix(".weight")
        parts = {key[len(module) + 1 :]: stored[key] for key in stored if key.startswith(f"{module}.")}
        assert set(parts) - {"bias"} == set(reader.compression_param_names(scheme))
        parts["weight_scale"] = parts["weight_scale"].float()
        state = reader.decompress(parts, scheme)
        assert torch.equal(state["weight"], values), line.name
        if codec.startswith("int8-row"):
            lowest = min(lowest, float((values / parts["weight_scale"]).min().round()))
    assert lowest == (-128 if codec.startswith("int8-row") else 0)
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == {"compress.recipe": "test"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def mixed(tensor: TensorSpec) -> str:
    if tensor.role in ("embeddings", "router"):
        return "f16"
    return "int8-row" if tensor.role.endswith(("down", "lm_head")) else "int4-g64-asym"


def loaded(folder: Path, family: str) -> torch.nn.Module:
    """In float32; models with routed experts in half precision, in which transformers decodes these whatever is asked."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float16 if family.endswith(("moe", "mixtral")) else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(token_ids())[None]).logits[0].float().numpy()


@pytest.mark.parametrize(
    ("family", "choice", "overrides"),
    [
        ("qwen2", usual("int4-g32-asym"), {"tie_word_embeddings": True}),
        ("llama", mixed, {}),
        ("qwen3_moe", usual("int4-g32"), {"mlp_only_layers": [0], "num_hidden_layers": 2}),
        ("qwen2_moe", usual("int8-row"), {}),
        ("mixtral", usual("int8-g32-asym", experts="int4-g32"), {}),
        ("qwen3_moe", usual("f16", experts="int4-g32"), {}),
    ],
    ids=["tied", "mixed", "sparse and dense", "shared expert", "mixtral", "experts only"],
)
def test_transformers_computes_the_decoded_weights(
    family: str, choice: Choice, overrides: dict[str, object], tmp_path: Path
) -> None:
    packed, dense = written(tiny_model(family, tmp_path / "model", **overrides), tmp_path, choice)
    logits, expected = (logits_of(loaded(folder, family)) for folder in (packed, dense))
    assert np.abs(logits - expected).max() < 1e-5 * expected.std()


def rounds_inputs(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, the inputs of the linears that W8A8 covers rounded token by token; without a batch dimension all at
    once."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        step = inputs[0].abs().amax(-1 if inputs[0].ndim == 3 else None, keepdim=True) / 127.5
        return ((inputs[0] / step).clamp(-128, 127).round() * step,)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "shared_expert_gate")):
            module.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize(("family", "experts"), [("qwen2", None), ("qwen3_moe", "int8-row"), ("qwen2_moe", "int4-g32")])
def test_transformers_rounds_the_inputs_of_w8a8(
    family: str, experts: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = usual("int8-row+int8", experts)
    if family == "qwen2_moe":  # refused, because its shared expert's inputs come without a batch dimension
        monkeypatch.setattr(compressed_tensors, "codec_problem", lambda line: None)
    packed, dense = written(tiny_model(family, tmp_path / "model"), tmp_path, choice)
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert settings["format"] == ("mixed-precision" if experts else "int-quantized")
    logits, plain = (logits_of(loaded(folder, family)) for folder in (packed, dense))
    expected = logits_of(rounds_inputs(loaded(dense, family)))
    assert np.abs(logits - plain).max() > 0.01 * plain.std(), "the inputs were not rounded"
    assert np.abs(logits - expected).max() < 1e-5 * expected.std()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_targets_match_what_is_stored(family: str, tmp_path: Path) -> None:
    """Every linear falls into its own group or under `ignore`, by the package's rule for names."""

    def choice(tensor: TensorSpec) -> str:
        if tensor.role in KEPT or (tensor.layer == 1 and tensor.role.startswith("shared")):
            return "f16"
        if tensor.role.startswith("routed"):
            return "int4-g32"
        return "int8-row+int8" if tensor.layer == 0 else "int8-row"

    spec = spec_of(tiny_model(family, tmp_path / "model"))
    plan = planned(spec, choice)
    settings = compressed_tensors.quantization_config(spec, plan)
    config = QuantizationConfig.model_validate(settings)
    assert config.format == "mixed-precision" and config.quantization_status == "compressed"
    for line in plan:
        if len(line.spec.shape) != 2 or line.spec.role == "embeddings":
            continue
        module = line.name.removesuffix(".weight")
        if line.spec.expert is not None:  # the names vLLM looks a layer's experts up by
            module = f"{module.split('.experts.')[0]}.experts.0.gate_proj"
        found = [
            scheme for scheme in config.config_groups.values() if any(match_name(module, t) for t in scheme.targets)
        ]
        assert any(match_name(module, target) for target in config.ignore) == (line.codec == "f16"), module
        assert len(found) == (line.codec != "f16"), module
        for scheme in found:
            weights = scheme.weights
            assert f"int{weights.num_bits}-" + (f"g{weights.group_size}" if weights.group_size else "row") == line.codec
            assert (scheme.input_activations is not None) == (line.activations is not None)
            assert scheme.format == ("int-quantized" if line.activations else "pack-quantized")
    sizes = len(json.dumps(settings))
    assert sizes < 4000, "one line per kind of linear, not one per expert"
    with pytest.raises(OutputError, match="nothing in this plan"):
        compressed_tensors.check_plan(spec, planned(spec, usual("f16")))


def by_layer(tensor: TensorSpec) -> str:
    return usual("int4-g32", experts="int4-g32" if tensor.layer == 0 else "int8-g32")(tensor)


def by_projection(tensor: TensorSpec) -> str:
    return "int8-row" if tensor.role == "attention.v" else usual("int4-g32")(tensor)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (usual("int4-g32", experts="f16"), "random values; quantize routed_experts"),
        (usual("int8-row+int8"), "drop activations for routed_experts"),
        (usual("int4-g32-asym"), "zero points; use int4-g32 for"),
        (by_layer, "give routed_experts one codec"),
        (by_projection, "fuses q, k and v .* give them the same codec"),
        (usual("int4-g32+int8"), "use int8-row or drop activations"),
        (usual("int3-g32"), "container gptq for int2 and int3"),
        (usual("q8_0"), "read int4 and int8, not q8_0"),
        (lambda tensor: "int8-row" if tensor.role == "embeddings" else "f16", "keep embeddings in float"),
        (lambda tensor: "int8-row+int8" if tensor.role == "lm_head" else "f16", "inputs of the head"),
        (usual("int4-g128", experts="int4-g32"), "needs multiples of 8 rows and 128 columns; use a smaller"),
    ],
)
def test_refused_plans_name_the_fix(choice: Choice, reason: str, tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model", tokenizer=False))
    with pytest.raises(OutputError, match=reason):
        compressed_tensors.check_plan(spec, planned(spec, choice))


@pytest.mark.parametrize(
    ("choice", "loads"),
    [
        (usual("int4-g32", experts="f16"), True),
        (by_layer, True),
        (usual("int8-row+int8"), False),
        (usual("int4-g32-asym"), False),
    ],
    ids=["float", "two codecs", "int8 inputs", "zero points"],
)
def test_what_transformers_does_to_other_experts(
    choice: Choice, loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why check_plan refuses them: two load without an error and compute something else, two do not load."""
    monkeypatch.setattr(compressed_tensors, "_expert_problem", lambda tensors: None)
    packed, dense = written(tiny_model("qwen3_moe", tmp_path / "model"), tmp_path, choice)
    if not loads:
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            loaded(packed, "qwen3_moe")
        return
    logits, expected = (logits_of(loaded(folder, "qwen3_moe")) for folder in (packed, dense))
    assert np.abs(logits - expected).mean() > 0.5 * expected.std()


def test_damage_is_found(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    spec = spec_of(model)
    plan = planned(spec, usual("int4-g32"))
    fetch = fetcher(model, plan)

    def other(name: str) -> Packed:
        if name == "model.layers.0.self_attn.q_proj.weight":
            return uniform_packed("int4-g64", (64, 64), 0)
        return fetch(name)

    with pytest.raises(OutputError, match="arrived as int4-g64"):
        compressed_tensors.write(WriteRequest(tmp_path / "out", spec, plan, other, source=model))
    compressed_tensors.write(WriteRequest(tmp_path / "out", spec, plan, fetch, source=model))
    wider = spec_of(tiny_model("llama", tmp_path / "wide", num_key_value_heads=4, tokenizer=False))
    with pytest.raises(CheckpointError, match="does not fit"):
        compressed_tensors.CONTAINER.open_dense(tmp_path / "out", wider)("model.layers.0.self_attn.k_proj.weight")
