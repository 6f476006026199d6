"""Folders that transformers loads in 4 bits: weights and logits of the loaded model against the decoded weights.

`check_plan` refuses what transformers would leave wrong without a word; what it skips is read from the loaded model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.codecs import get_codec
from compress.containers import bitsandbytes, safetensors
from compress.containers.base import Options, WriteRequest
from compress.errors import CheckpointError, OutputError
from compress.models import ModelSpec, TensorSpec
from compress.solvers import gptq, rtn
from compress.solvers.options import GptqOptions, RtnOptions
from compress.weights import Packed
from tests.integration.containers import DTYPES, Planned, spec_of, token_ids, weights_of
from tests.tiny import tiny_model

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")  # transformers loads no bitsandbytes model without it

WIDE = {"hidden_size": 128, "intermediate_size": 192}


def linears(tensor: TensorSpec) -> bool:
    return tensor.role.startswith(("attention", "mlp", "shared_experts"))


def partly(tensor: TensorSpec) -> bool:
    """All linears but down_proj and one q_proj."""
    return linears(tensor) and tensor.role != "mlp.down" and (tensor.layer, tensor.role) != (1, "attention.q")


class Case:
    """A tiny model with the tensors of `chosen` in `codec`, and what `write` needs of it."""

    def __init__(self, folder: Path, family: str, codec: str, chosen: Callable[[TensorSpec], bool] = linears,
                 dtype: str = "f32", **overrides: object):  # fmt: skip
        self.model = tiny_model(family, folder, **overrides)
        self.spec, self.weights = spec_of(self.model), weights_of(self.model)
        self.lines = [Planned(t, codec if chosen(t) else dtype) for t in self.spec.tensors()]
        self.codecs = {line.spec.name: line.codec for line in self.lines}
        self.dtype = dtype

    def fetch(self, name: str) -> Packed:
        weight, codec = self.weights[name], self.codecs[name]
        if codec in DTYPES:
            return Packed(codec, tuple(weight.shape), {"values": weight.to(DTYPES[codec])})
        return rtn.solve(weight.float(), None, get_codec(codec), RtnOptions()).pack()

    def write(self, folder: Path, **options: int) -> list[Path]:
        return bitsandbytes.write(WriteRequest(
            folder, self.spec, self.lines, self.fetch, source=self.model, options=Options(**options),
            provenance={"compress.recipe": "test"},
        ))  # fmt: skip

    def dense(self, folder: Path) -> torch.nn.Module:
        """The decoded weights, loaded by transformers."""
        options = Options(dtype=self.dtype)
        safetensors.write(WriteRequest(folder, self.spec, self.lines, self.fetch, source=self.model, options=options))
        return load(folder)


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: torch.nn.Module, training: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return model.train(training)(torch.from_numpy(token_ids())[None]).logits.float()


@pytest.mark.parametrize(
    ("family", "codec", "chosen", "dtype", "overrides"),
    [
        ("llama", "nf4", linears, "f32", WIDE),
        ("llama", "nf4-dq", linears, "bf16", WIDE),
        ("qwen2", "nf4-dq", linears, "f32", WIDE),
        ("qwen3", "fp4-dq", partly, "f32", WIDE),
        ("llama", "fp4", partly, "f32", {**WIDE, "tie_word_embeddings": True}),
        ("qwen3_moe", "nf4", linears, "f32", {}),
        ("qwen2_moe", "nf4-dq", linears, "f32", {}),
    ],
)
def test_transformers_computes_with_the_decoded_weights(
    family: str, codec: str, chosen: Callable[[TensorSpec], bool], dtype: str, overrides: dict, tmp_path: Path
) -> None:
    case = Case(tmp_path / "model", family, codec, chosen, dtype, **overrides)
    case.write(tmp_path / "out")
    loaded, dense = load(tmp_path / "out"), case.dense(tmp_path / "dense")
    four_bit = {name: m for name, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(four_bit) == {name.removesuffix(".weight") for name, c in case.codecs.items() if c == codec}
    for name, module in four_bit.items():
        # before any forward: on CPUs with AVX512-BF16 that repacks the weight
        values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        decoded = get_codec(codec).unpack(case.fetch(f"{name}.weight"))
        assert torch.equal(values, decoded.to(DTYPES[dtype])), name
    expected = dict(dense.named_parameters())
    floats = {name: p for name, p in loaded.named_parameters() if p.dtype != torch.uint8}
    assert len(floats) + len(four_bit) == len(expected)
    assert all(torch.equal(values, expected[name]) for name, values in floats.items())
    # training mode (these models have no dropout) keeps off the CPU kernel, which computes in bfloat16 throughout
    reference = logits(dense)
    assert torch.equal(logits(loaded, training=True), reference)
    if not case.spec.experts:  # there another expert may be chosen
        assert (logits(loaded) - reference).abs().mean() < 0.06 * reference.std()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = str(DTYPES[dtype]).removeprefix("torch.")
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == wanted


@pytest.mark.parametrize("codec", ["nf4", "fp4-dq"])
def test_bitsandbytes_writes_the_same_folder(codec: str, tmp_path: Path) -> None:
    """Rounding to nearest against `from_pretrained(load_in_4bit)` and `save_pretrained`: every tensor, every setting."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    case = Case(tmp_path / "model", "llama", codec, **WIDE)
    (ours,) = case.write(tmp_path / "out")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=codec[:3], bnb_4bit_use_double_quant=codec.endswith("-dq")
    )
    model = AutoModelForCausalLM.from_pretrained(case.model, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    stored, expected = load_file(ours), weights_of(tmp_path / "theirs")
    assert set(stored) == set(expected)
    for name, values in expected.items():
        if "quant_state" in name:
            assert json.loads(bytes(stored[name].tolist())) == json.loads(bytes(values.tolist()))
        else:
            assert stored[name].dtype == values.dtype and torch.equal(stored[name], values), name
    mine, other = (
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("out", "theirs")
    )
    assert all(other[key] == value for key, value in mine.items() if key != "llm_int8_skip_modules")
    assert mine["llm_int8_skip_modules"] == ["lm_head"]


def test_solved_codes_ship_as_they_are(tmp_path: Path) -> None:
    case = Case(tmp_path / "model", "llama", "nf4-dq", **WIDE)
    solved = {}
    for name, codec in case.codecs.items():
        if codec == "nf4-dq":
            weight = case.weights[name]
            x = torch.randn(300, weight.shape[1], generator=torch.Generator().manual_seed(1)).cumsum(1) / 8
            solved[name] = gptq.solve(weight, x.T @ x / 300, get_codec(codec), GptqOptions()).pack()
    files = bitsandbytes.write(WriteRequest(
        tmp_path / "out", case.spec, case.lines, lambda name: solved.get(name) or case.fetch(name), source=case.model,
        options=Options(max_shard_size=400_000),
    ))  # fmt: skip
    assert len(files) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    loaded = load(tmp_path / "out")
    dense = bitsandbytes.load_dense(tmp_path / "out", case.spec)
    assert set(dense) == set(case.weights)
    for name, weight in case.weights.items():
        expected = get_codec("nf4-dq").unpack(solved[name]) if name in solved else weight
        assert torch.equal(dense[name], expected), name
        if name in solved:
            module = loaded.get_submodule(name.removesuffix(".weight"))
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(values, expected), name


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_skipped_modules_by_the_rule_of_transformers(family: str, tmp_path: Path) -> None:
    """Twelve layers, so that layer 1 could be taken for 10 and 11; another choice of modules in each."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    sparse = {"mlp_only_layers": [1, 4]} if family.startswith("qwen") else {}
    model = tiny_model(family, tmp_path / "model", num_hidden_layers=12, tokenizer=False, **sparse)
    spec = spec_of(model)

    def codec(tensor: TensorSpec) -> str:
        chosen = linears(tensor) and sum(tensor.name.encode()) % 3 > 0 and tensor.shape[1] % 64 == 0
        return "nf4" if chosen else "bf16"

    lines = [Planned(tensor, codec(tensor)) for tensor in spec.tensors()]
    skipped = bitsandbytes.quantization_config(lines)["llm_int8_skip_modules"]
    modules = [line for line in lines if len(line.spec.shape) == 2 and linears(line.spec)]
    assert {line.codec for line in modules} == {"nf4", "bf16"}
    for line in modules:
        assert should_convert_module(line.spec.name.removesuffix(".weight"), skipped) == (line.codec == "nf4"), line
    assert not should_convert_module("lm_head", skipped)


def refusal(spec: ModelSpec, lines: list[Planned]) -> str:
    with pytest.raises(OutputError) as caught:
        bitsandbytes.check_plan(spec, lines)
    return str(caught.value)


def test_what_transformers_would_leave_wrong_is_refused(tmp_path: Path) -> None:
    spec = spec_of(tiny_model("qwen3_moe", tmp_path / "model", moe_intermediate_size=96, tokenizer=False))

    def with_role(role: str, codec: str = "nf4", others: str = "bf16") -> list[Planned]:
        return [Planned(t, codec if t.role == role else others) for t in spec.tensors()]

    bitsandbytes.check_plan(spec, with_role("attention.q"))
    way_out = "export to container compress"
    for role in ("routed_experts.up", "embeddings", "lm_head", "router", "norms"):
        message = refusal(spec, with_role(role))
        assert message.endswith(way_out) and "in float" in message
    assert "fuses routed experts" in refusal(spec, with_role("routed_experts.down"))
    assert "nf4, fp4 and floats, not int4-g32" in refusal(spec, with_role("attention.q", "int4-g32"))
    assert "nothing in this plan" in refusal(spec, with_role("attention.q", "f16"))
    for other in ("fp4", "nf4-dq"):
        lines = [Planned(p.spec, other if p.spec.role == "attention.k" else p.codec) for p in with_role("attention.q")]
        assert "mixes" in refusal(spec, lines) and way_out in refusal(spec, lines)
    narrow = spec_of(tiny_model("llama", tmp_path / "narrow", hidden_size=72, tokenizer=False))
    lines = [Planned(t, "nf4" if t.role == "attention.q" else "f32") for t in narrow.tensors()]
    assert "rows of 72 do not divide into blocks of 64" in refusal(narrow, lines)


def test_wrong_tensors_and_damaged_folders(tmp_path: Path) -> None:
    case = Case(tmp_path / "model", "llama", "nf4", **WIDE)

    def swapped(name: str) -> Packed:
        packed = case.fetch(name)
        return Packed("fp4", packed.shape, packed.parts) if packed.codec == "nf4" else packed

    with pytest.raises(OutputError, match="arrived as fp4"):
        bitsandbytes.write(WriteRequest(tmp_path / "out", case.spec, case.lines, swapped, source=case.model))
    assert not (tmp_path / "out").exists()
    (file,) = case.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == {"compress.recipe": "test"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"shape": [128, 128]', b'"shape": [128, 192]'))
    with pytest.raises(CheckpointError, match="does not fit"):
        bitsandbytes.load_dense([file], case.spec)
