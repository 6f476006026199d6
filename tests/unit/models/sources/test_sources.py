"""Quantized checkpoints decoded, one tensor at a time: held against the programs that read these formats, bit by bit.

The oracles are transformers (FP8, MXFP4), compressed-tensors and bitsandbytes; for GPTQ, AWQ and ModelOpt, whose programs need a
GPU, the formula of the format over codes that are packed here bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import CheckpointError, ConfigError
from compress.models.checkpoint import INDEX, SINGLE, Checkpoint, same_bytes
from compress.models.sources import formats
from compress.models.sources.base import Coded

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def folder(place: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], **config: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / SINGLE)
    return place


def read(place: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "m.weight") -> Tensor:
    checkpoint = Checkpoint.open(folder(place, settings, tensors))
    assert list(checkpoint.entries) == [name] and checkpoint.entries[name].quantized and not checkpoint.unread
    values = checkpoint.load(name)
    assert values.dtype == torch.float32 and tuple(values.shape) == checkpoint.entries[name].shape
    return values


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def octets(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def powers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(110, 130, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# -- FP8 ---------------------------------------------------------------------------------------------------------------
def transformers_fp8(values: Tensor, scale: Tensor) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((256, 384), random(2, 3).abs()),
        ((256, 384), random(2, 3).abs().bfloat16()),
        ((256, 384), powers(2, 3)),
        ((256, 384), powers(2, 3).view(torch.float8_e8m0fnu)),
        ((96, 64), torch.tensor(0.017)),
        ((96, 64), random(96, 1).abs()),
        ((3, 128, 256), random(3, 1, 2).abs()),
    ],
    ids=["float32", "bfloat16", "bytes", "ue8m0", "tensor", "rows", "stack"],
)
def test_fp8_as_transformers_decodes_it(tmp_path: Path, shape: tuple[int, ...], scale: Tensor) -> None:
    values = random(*shape).to(torch.float8_e4m3fn)
    found = read(tmp_path, FP8, {"m.weight": values, "m.weight_scale_inv": scale})
    assert torch.equal(found, transformers_fp8(values, scale))


def test_the_last_blocks_of_fp8_may_be_shorter(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows; its own program multiplies block by block."""
    values, scale = random(200, 300).to(torch.float8_e4m3fn), random(2, 3).abs()
    expected = values.float()
    for row in range(200):
        for column in range(300):
            expected[row, column] *= scale[row // 128, column // 128]
    assert torch.equal(read(tmp_path, FP8, {"m.weight": values, "m.weight_scale_inv": scale}), expected)


def test_4_bit_floats_beside_fp8(tmp_path: Path) -> None:
    values, scale = octets(64, 32).view(torch.int8), powers(64, 2).view(torch.float8_e8m0fnu)
    found = read(tmp_path, FP8, {"m.weight": values, "m.weight_scale_inv": scale})
    assert torch.equal(found, transformers_fp8(values, scale))


def test_fbgemm_has_a_scale_a_row_and_stacks_have_theirs_by_columns(tmp_path: Path) -> None:
    values, scale = random(2, 32, 64).to(torch.float8_e4m3fn), random(2, 1, 64).abs()
    tensors = {"m.gate_up_proj": values, "m.gate_up_proj_scale": scale}
    found = read(tmp_path, {"quant_method": "fbgemm_fp8"}, tensors, "m.gate_up_proj")
    assert torch.equal(found, values.float() * scale)


# -- MXFP4 -------------------------------------------------------------------------------------------------------------
def test_mxfp4_as_transformers_decodes_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = octets(3, 64, 2, 16), powers(3, 64, 2)
    tensors = {"m.gate_up_proj_blocks": blocks, "m.gate_up_proj_scales": scales}
    found = read(tmp_path, {"quant_method": "mxfp4"}, tensors, "m.gate_up_proj")
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(blocks, scales))
    entry = Checkpoint.open(tmp_path).entries["m.gate_up_proj"]
    with entry.opened() as opened:
        each = list(entry.matrices("m.gate_up_proj", opened))
    assert len(each) == 3 and torch.equal(torch.stack(each), found)


def test_mxfp4_is_stored_as_mxfp4_without_loss() -> None:
    """In another file format: what was four bits stays these four bits."""
    from compress.codecs import block_codec
    from compress.models.sources.mxfp4 import _decode

    values = _decode({"values": octets(64, 4, 16), "scales": powers(64, 4)}).T.contiguous()
    codec = block_codec("mxfp4", 128)
    grid, target = codec.rounding(values, torch.ones(128))
    assert torch.equal(codec.decode(codec.round(target), grid), values)


# -- GPTQ --------------------------------------------------------------------------------------------------------------
def packed(codes: np.ndarray, bits: int) -> Tensor:
    """Codes [n, m] as the bits of one long number a column, lowest first, cut into words: int32 [ceil(n * bits / 32), m]."""
    words = []
    for column in codes.T:
        number = sum(int(code) << place * bits for place, code in enumerate(column))
        count = -(-len(column) * bits // 32)
        words.append([number >> 32 * word & 0xFFFFFFFF for word in range(count)])
    return torch.from_numpy(np.array(words, dtype=np.uint32).T.copy().view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", [True, False, None])
def test_gptq_by_its_formula(tmp_path: Path, bits: int, form: str | None, order: bool | None) -> None:
    """order: whether groups are in the order of activations, None where nothing tells groups but their size."""
    draw = np.random.default_rng(bits)
    rows, columns, groups = 64, 96, 3
    codes, zeros = draw.integers(0, 1 << bits, (columns, rows)), draw.integers(1, 1 << bits, (groups, rows))
    scales = torch.from_numpy(draw.random((groups, rows), dtype=np.float32)).half()
    group = np.arange(columns) // (columns // groups)
    group = draw.permutation(group) if order else group
    stored = zeros if form == "gptq_v2" else zeros - 1
    tensors = {
        "m.qweight": packed(codes, bits), "m.qzeros": packed(stored.T, bits).T, "m.scales": scales,
        "m.g_idx": torch.from_numpy(group.astype(np.int32)),
    }  # fmt: skip
    if order is None:
        del tensors["m.g_idx"]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": bool(order)}
    found = read(tmp_path, settings | ({"checkpoint_format": form} if form else {}), tensors)
    expected = (codes - zeros[group]).astype(np.float32) * scales.float().numpy()[group]
    assert np.array_equal(found.numpy(), expected.T)


@pytest.mark.parametrize("said", ["quant_config", "auto-round"])
def test_gptq_and_awq_under_other_names(tmp_path: Path, said: str) -> None:
    """What config.json does not say, older folders say beside it; AutoRound says whose layout it has written."""
    words, zeros = (
        torch.arange(8 * 32, dtype=torch.int32).reshape(8, 32),
        torch.full((2, 4), 0x77777777, dtype=torch.int32),
    )
    tensors = {"m.qweight": words, "m.qzeros": zeros, "m.scales": torch.ones(2, 32)}
    plain = read(tmp_path / "plain", {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    awq = {"m.qweight": words.reshape(64, 4), "m.qzeros": zeros, "m.scales": torch.ones(2, 32)}
    interleaved = read(tmp_path / "awq", {"quant_method": "awq"}, awq)
    if said == "auto-round":
        settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
        assert torch.equal(read(tmp_path / "a", settings, tensors), plain)
        assert torch.equal(read(tmp_path / "b", settings | {"packing_format": "auto_round:auto_awq"}, awq), interleaved)
        other = folder(tmp_path / "c", settings | {"packing_format": "auto_round:llm_compressor"}, tensors)
        assert "'auto_round:llm_compressor'; of AutoRound's" in Checkpoint.open(other).unread
        return
    for name, stored, file, expected in (
        ("a", tensors, "quantize_config.json", plain), ("b", awq, "quant_config.json", interleaved)
    ):  # fmt: skip
        place = folder(tmp_path / name, {}, stored)
        (place / "config.json").write_text("{}")
        (place / file).write_text(json.dumps({"bits": 4, "group_size": 32}))
        assert torch.equal(Checkpoint.open(place).load("m.weight"), expected)


# -- AWQ ---------------------------------------------------------------------------------------------------------------
def test_awq_by_its_formula(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows, columns, groups = 32, 64, 2
    codes, zeros = draw.integers(0, 16, (columns, rows)), draw.integers(0, 16, (groups, rows))
    scales = torch.from_numpy(draw.random((groups, rows), dtype=np.float32)).half()

    def words(values: np.ndarray) -> Tensor:
        out = np.zeros((len(values), rows // 8), dtype=np.uint32)
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            out |= values[:, output::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(out.view(np.int32))

    tensors = {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": scales}
    found = read(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}, tensors)
    group = np.arange(columns) // 32
    assert np.array_equal(found.numpy(), ((codes - zeros[group]).astype(np.float32) * scales.float().numpy()[group]).T)


# -- compressed-tensors ------------------------------------------------------------------------------------------------
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], tuple[int, ...]]] = {
    "int4": ("pack-quantized", INT4, (48, 96), (48, 3)),
    "int4 with zero points": ("pack-quantized", {**INT4, "symmetric": False}, (48, 96), (48, 3)),
    "int8 rows": ("pack-quantized", {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None}, (40, 70), (40, 1)),
    "int3": ("pack-quantized", {**INT4, "num_bits": 3}, (40, 64), (40, 2)),
    "int8": ("int-quantized", {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None}, (48, 64), (48, 1)),
    "int8 with zero points": (
        "int-quantized", {**INT4, "num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False}, (48, 64),
        (48, 1),
    ),
    "fp8 rows": ("float-quantized", {**FLOAT8, "strategy": "channel"}, (48, 64), (48, 1)),
    "fp8 tensor": ("float-quantized", {**FLOAT8, "strategy": "tensor"}, (48, 64), (1,)),
    "fp8 blocks": (
        "float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [32, 32]}, (64, 96), (2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compressed_tensors_as_the_package_decodes_them(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """The package decodes in the type of the scales; widened before, they give what the file means."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, weights, shape, scales = CASES[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": random(*shape), "weight_scale": (0.02 + 0.2 * random(*scales).abs()).to(dtype).float()}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = torch.randint(-7, 7, scales, dtype=torch.int8)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    tensors["m.weight_scale"] = tensors["m.weight_scale"].to(dtype)
    settings = {"quant_method": "compressed-tensors", "format": form}
    assert torch.equal(read(tmp_path, settings, tensors), expected.float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_that_say_their_group(tmp_path: Path, symmetric: bool) -> None:
    """Folders of compressed-tensors before 0.19, ordered by activations: columns in another order are the same columns."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(-8, 8, (16, 96), dtype=torch.int8)
    tensors = {"m.weight_scale": random(16, 3).abs(), "m.weight_shape": torch.tensor([16, 96])}
    if not symmetric:
        zeros = torch.randint(-8, 8, (16, 3), dtype=torch.int8)
        tensors["m.weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
    in_turn = read(tmp_path, TENSORS, {**tensors, "m.weight_packed": pack_to_int32(codes, 4)})
    tensors |= {"m.weight_packed": pack_to_int32(codes[:, order], 4), "m.weight_g_idx": (order // 32).int()}
    assert torch.equal(read(tmp_path, TENSORS, tensors), in_turn[:, order])
    tensors |= {"m.weight_packed": pack_to_int32(codes, 4), "m.weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    assert torch.equal(read(tmp_path, TENSORS, tensors), in_turn)


@pytest.mark.parametrize("nested", [True, False], ids=["nvfp4", "mxfp4"])
def test_4_bit_floats_of_compressed_tensors(tmp_path: Path, nested: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    values = octets(32, 32)
    plain = unpack_fp4_from_uint8(values, 32, 64, dtype=torch.float32)
    tensors = {"m.weight_packed": values}
    if nested:
        scale, over = random(32, 4).abs().to(torch.float8_e4m3fn), torch.tensor([37.5])
        tensors |= {"m.weight_scale": scale, "m.weight_global_scale": over}
        expected = plain * (scale.float() / over).repeat_interleave(16, 1)
    else:
        scale = powers(32, 2)
        tensors["m.weight_scale"] = scale
        expected = plain * decompress_mx_scale(scale).float().repeat_interleave(32, 1)
    form = "nvfp4-pack-quantized" if nested else "mxfp4-pack-quantized"
    found = read(tmp_path, {"quant_method": "compressed-tensors", "format": form}, tensors)
    assert torch.equal(found, expected)


def test_nvfp4_of_modelopt_multiplies_what_compressed_tensors_divides(tmp_path: Path) -> None:
    values, scale, over = octets(32, 32), random(32, 4).abs().to(torch.float8_e4m3fn), torch.tensor(0.03)
    tensors = {"m.weight": values, "m.weight_scale": scale, "m.weight_scale_2": over}
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = np.empty((32, 64), dtype=np.float32)
    for row in range(32):
        for column in range(64):
            code = int(values[row, column // 2]) >> 4 * (column % 2) & 15
            value = np.float32(levels[code & 7] * (-1 if code & 8 else 1))
            expected[row, column] = value * (np.float32(scale.float()[row, column // 16]) * np.float32(over))
    found = read(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors)
    assert np.array_equal(found.numpy(), expected)


# -- bitsandbytes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(48, 128), (30, 72)])
def test_four_bits_of_bitsandbytes(tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int]) -> None:
    """Blocks run on over the ends of rows, and the last may be short."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(random(*shape), quant_type=kind, compress_statistics=nested)
    expected = functional.dequantize_4bit(codes, state)
    tensors = {"m.weight": codes, **{f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    assert torch.equal(read(tmp_path / "a", settings, tensors), expected)
    tensors["m.weight"] = codes.reshape(-1).view(torch.bfloat16)[:, None]  # bnb_4bit_quant_storage
    assert torch.equal(read(tmp_path / "b", settings, tensors), expected)


def test_eight_bits_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(random(48, 64).half())
    tensors = {"m.weight": codes, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert torch.equal(read(tmp_path, settings, tensors), functional.int8_vectorwise_dequant(codes, scale))
    tensors["m.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="version 0.43"):
        Checkpoint.open(folder(tmp_path, settings, tensors))


# -- the checkpoint around it ------------------------------------------------------------------------------------------
def test_parts_may_lie_in_several_files(tmp_path: Path) -> None:
    place = folder(tmp_path, FP8, {"m.weight": random(128, 128).to(torch.float8_e4m3fn), "n.bias": torch.ones(2)})
    (place / SINGLE).rename(place / "a.safetensors")
    save_file({"m.weight_scale_inv": torch.full((1, 1), 3.0)}, place / "b.safetensors")
    where = {"m.weight": "a.safetensors", "n.bias": "a.safetensors", "m.weight_scale_inv": "b.safetensors"}
    (place / INDEX).write_text(json.dumps({"weight_map": where}))
    checkpoint = Checkpoint.open(place)
    assert [file.name for file in checkpoint.weight_files] == ["a.safetensors", "b.safetensors"]
    assert torch.equal(checkpoint.load("m.weight"), 3 * random(128, 128).to(torch.float8_e4m3fn).float())
    assert torch.equal(checkpoint.load("n.bias"), torch.ones(2))


def test_what_is_said_of_a_source(tmp_path: Path) -> None:
    """Types with their shares, scales of activations as left out, the float type of config.json for what was quantized."""
    tensors = {
        "m.weight": torch.zeros(128, 96).to(torch.float8_e4m3fn), "m.weight_scale": torch.ones(()),
        "m.input_scale": torch.ones(()), "m.k_scale": torch.ones(()), "n.weight": torch.ones(32, 128).bfloat16(),
    }  # fmt: skip
    checkpoint = Checkpoint.open(
        folder(tmp_path, {"quant_method": "fp8"}, tensors, torch_dtype="float16", model_type="x")
    )
    assert sorted(checkpoint.entries) == ["m.weight", "n.weight"] and checkpoint.config == {
        "torch_dtype": "float16", "model_type": "x",
    }  # fmt: skip
    assert checkpoint.entries["m.weight"].codec == "f16" and checkpoint.entries["n.weight"].codec == "bf16"
    told, beside = checkpoint.notes
    assert "already quantized (FP8 75.0%, BF16 25.0% of the weights; 1 tensors)" in told and "closer" in told
    assert "activations" in beside and "(2 tensors)" in beside


def test_without_weights_config_json_says_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    assert checkpoint.notes and "GPTQ" in checkpoint.notes[0] and not checkpoint.unread


@pytest.mark.parametrize("where", [("text_config",), ()])
def test_wrappers_say_it_of_their_text_model(tmp_path: Path, where: tuple[str, ...]) -> None:
    inner = {"quantization_config": FP8, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner} if where else inner))
    save_file(
        {"a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)},
        tmp_path / SINGLE,
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.entries) == ["a.weight"] and "quantization_config" not in json.dumps(dict(checkpoint.config))


def test_an_unknown_method_is_left_as_it_is_stored(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder(tmp_path, {"quant_method": "hqq"}, {"m.weight": octets(4, 4)}))
    assert checkpoint.entries["m.weight"].dtype == "U8" and checkpoint.entries["m.weight"].codec is None
    assert "(hqq)" in checkpoint.unread
    for method in {method for form in formats() for method in form.methods}:
        assert method in checkpoint.unread


def test_the_documentation_lists_all_formats() -> None:
    text = (Path(__file__).resolve().parents[4] / "docs" / "recipes.md").read_text()
    for form in formats():
        methods = ", ".join(f"`{method}`" for method in form.methods)
        assert f"| {form.name} | {methods} | {form.holds} |" in text


def test_equal_codes_under_other_scales_are_not_the_same_tensor(tmp_path: Path) -> None:
    values = random(8, 8).to(torch.float8_e4m3fn)
    tensors = {f"{m}.weight": values.clone() for m in "abc"}
    tensors |= {f"{m}.weight_scale": torch.tensor(scale) for m, scale in {"a": 1.0, "b": 2.0, "c": 1.0}.items()}
    entries = Checkpoint.open(folder(tmp_path, {"quant_method": "fp8"}, tensors)).entries
    assert same_bytes(entries["a.weight"], entries["c.weight"]) and not same_bytes(
        entries["a.weight"], entries["b.weight"]
    )
    assert isinstance(entries["a.weight"], Coded) and entries["a.weight"].bytes == 68


GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 32}
WHOLE = {
    "m.qweight": torch.zeros(8, 32, dtype=torch.int32), "m.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "m.scales": torch.ones(2, 32), "m.g_idx": torch.arange(64, dtype=torch.int32) // 32,
}  # fmt: skip
PACKED = {
    "m.weight_packed": torch.zeros(8, 8, dtype=torch.int32), "m.weight_scale": torch.ones(8, 2),
    "m.weight_shape": torch.tensor([8, 64]),
}  # fmt: skip
TENSORS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
Change = Callable[[dict[str, Tensor]], Any]
DAMAGE: list[tuple[dict[str, Any], dict[str, Tensor], Change, str]] = [
    (GPTQ4, WHOLE, lambda t: t.pop("m.scales"), "no tensor m.scales"),
    (GPTQ4, WHOLE, lambda t: t.update({"m.qweight": torch.zeros(8, 32)}), "is stored as F32, not as I32"),
    (GPTQ4, WHOLE, lambda t: t.update({"m.qweight": torch.zeros(9, 32, dtype=torch.int32)}), "m.qweight .* does not fit"),
    (GPTQ4, WHOLE, lambda t: t.update({"m.qzeros": torch.zeros(3, 4, dtype=torch.int32)}), "m.qzeros .* does not fit"),
    (GPTQ4, WHOLE, lambda t: t.update({"m.g_idx": torch.full((64,), 2, dtype=torch.int32)}), "names groups"),
    (TENSORS, PACKED, lambda t: t.pop("m.weight_shape"), "no tensor m.weight_shape"),
    (TENSORS, PACKED, lambda t: t.update({"m.weight_shape": torch.tensor([8, 90])}), "does not fit"),
    (TENSORS, PACKED, lambda t: t.update({"m.weight_shape": torch.tensor([8, -1])}), "no matrix's"),
    (TENSORS, PACKED, lambda t: t.update({"m.weight_scale": torch.ones(8, 3)}), "does not fit"),
    (TENSORS, PACKED, lambda t: t.update({"m.weight_g_idx": torch.full((64,), 5)}), "names groups"),
    (
        FP8, {"m.weight": torch.zeros(200, 64).to(torch.float8_e4m3fn)},
        lambda t: t.update({"m.weight_scale_inv": torch.ones(3, 1)}), "m.weight_scale_inv .* does not fit",
    ),
    ({"quant_method": "mxfp4"}, {"a_blocks": octets(2, 8, 1, 16)}, lambda t: None, "no tensor a_scales"),
    ({"quant_method": "mxfp4"}, {"a_blocks": octets(2, 8, 1, 8), "a_scales": octets(2, 8, 1)}, lambda t: None, "a_blocks"),
    (
        {"quant_method": "awq"}, {k: v for k, v in WHOLE.items() if k != "m.g_idx"}, lambda t: None, "does not fit",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "tensors", "change", "words"), DAMAGE)
def test_parts_that_contradict_each_other(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Tensor], change: Change, words: str
) -> None:
    change(damaged := dict(tensors))
    with pytest.raises(CheckpointError, match=words) as error:
        Checkpoint.open(folder(tmp_path, settings, damaged)).load("m.weight")
    assert "\n" not in str(error.value)


def test_settings_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config.bits: expected"):
        Checkpoint.open(folder(tmp_path, {**GPTQ4, "bits": "4"}, WHOLE))
