"""ggml's C code through ctypes agrees with the gguf package's Python code, and refuses what would abort the process."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")

from compress.engines.ggml import GGML_TYPES, dequantize_rows, quantize_rows

NEEDS_IMPORTANCE = ("iq1_s", "iq2_xxs", "iq2_xs")


def _rows(seed: int = 0, rows: int = 5, columns: int = 512) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((rows, columns)).astype(np.float32),
        (generator.random(columns) + 0.1).astype(np.float32),
    )


@pytest.mark.parametrize("name", sorted(GGML_TYPES))
def test_c_decoding_is_the_python_decoding(name: str) -> None:
    """Random bits: every code, sign and scale there is, infinities and NaN among them."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (64, 512 // block * size), dtype=np.uint8)
    native = {"f32": np.float32, "f16": np.float16}.get(name, np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks.view(native), kind)
    np.testing.assert_array_equal(dequantize_rows(name, blocks, 512), expected)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "iq2_xxs", "iq3_xxs"])
def test_encoding_comes_close(name: str) -> None:
    rows, importance = _rows()
    blocks = quantize_rows(name, rows, importance)
    error = float(((dequantize_rows(name, blocks, 512) - rows) ** 2).mean() ** 0.5)
    assert blocks.shape[1] * 8 / 512 < 7 and error < 0.45


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_0", "q5_1", "bf16", "f16", "f32"])
def test_c_encoding_is_the_python_encoding(name: str) -> None:
    rows, _ = _rows(1)
    expected = gguf.quantize(rows, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(quantize_rows(name, rows), expected.view(np.uint8).reshape(len(rows), -1))


def test_enum_is_the_gguf_packages() -> None:
    assert {name: gguf.GGMLQuantizationType[name.upper()].value for name in GGML_TYPES} == GGML_TYPES


def test_rows_are_independent_and_inputs_untouched() -> None:
    rows, importance = _rows(2)
    before = rows.copy()
    together = quantize_rows("iq2_xxs", rows[::-1], importance)  # a view with negative strides
    alone = np.concatenate([quantize_rows("iq2_xxs", row[None], importance) for row in rows[::-1]])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("name", NEEDS_IMPORTANCE)
def test_missing_importance_is_an_error_not_an_abort(name: str) -> None:
    with pytest.raises(ValueError, match="importance"):
        quantize_rows(name, _rows()[0])


def test_wrong_shapes_are_refused() -> None:
    rows, importance = _rows()
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize_rows("q4_k", rows[:, :288])
    with pytest.raises(ValueError, match="importance must have shape"):
        quantize_rows("q4_k", rows, importance[:256])
    with pytest.raises(ValueError, match="take 288 bytes"):
        dequantize_rows("q4_k", np.zeros((1, 144), np.uint8), 512)
    with pytest.raises(ValueError, match="no ggml type"):
        quantize_rows("q4_kk", rows)
