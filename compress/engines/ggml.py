"""ggml's own C code through llama-cpp-python: its rounding and decoding of rows, and llama.cpp's quantizer of whole files.

The oracle of the codecs' tests and the baseline of the benchmarks; nothing here runs a model.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.engines.llama_api import GGML_TYPES, default_threads, llama_api, log
from compress.errors import CompressError, OutputError

# enum llama_ftype (llama.h): the mixtures of `llama-quantize`.
FTYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20,
    "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28,
    "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37,
    "mxfp4_moe": 38,
}  # fmt: skip


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, up to the members read here."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@functools.cache
def _ggml() -> ctypes.CDLL:
    """libggml-base with the signatures of the functions used here; MissingExtra without llama-cpp-python."""
    api = llama_api()
    folder = Path(inspect.getfile(api)).parent / "lib"
    found = sorted(folder.glob("*ggml-base.*"), key=lambda path: len(path.name))
    if not found:
        raise CompressError(f"llama-cpp-python has no libggml-base in {folder}; reinstall it from source")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def _ggml_type(name: str) -> int:
    try:
        return GGML_TYPES[name.lower()]
    except KeyError:
        raise ValueError(f"{name!r} is no ggml type; known: {', '.join(GGML_TYPES)}") from None


def _row_bytes(type_name: str, columns: int) -> int:
    number = _ggml_type(type_name)
    block = _ggml().ggml_get_type_traits(number).contents.blck_size
    if columns % block:
        raise ValueError(f"{type_name} stores blocks of {block} columns; rows of {columns} do not divide")
    return int(_ggml().ggml_row_size(number, columns))


def quantize_rows(type_name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml's own rounding of float32 `rows` [rows, columns] to uint8 [rows, row_bytes] (ggml_quantize_chunk).

    `importance` float32 [columns] is llama.cpp's imatrix of the tensor: mean squared activation per column.
    IQ2_XXS, IQ2_XS and IQ1_S need one. ValueError on a wrong shape, MissingExtra without llama-cpp-python.
    """
    number = _ggml_type(type_name)
    source = np.ascontiguousarray(rows, dtype=np.float32)
    if source.ndim != 2:
        raise ValueError(f"rows must be [rows, columns], got {source.shape}")
    count, columns = source.shape
    row_bytes = _row_bytes(type_name, columns)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        if weights.shape != (columns,):
            raise ValueError(f"importance must have shape ({columns},), got {weights.shape}")
    elif _ggml().ggml_quantize_requires_imatrix(number):
        raise ValueError(f"{type_name} needs an importance vector")  # the C code would abort the process
    target = np.zeros((count, row_bytes), dtype=np.uint8)
    written = _ggml().ggml_quantize_chunk(
        number, source.ctypes.data, target.ctypes.data, 0, count, columns,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    if written != target.nbytes:
        raise CompressError(f"ggml wrote {written} bytes of {type_name} where {target.nbytes} were expected")
    return target


def dequantize_rows(type_name: str, blocks: np.ndarray, columns: int) -> np.ndarray:
    """ggml's own decoding of uint8 `blocks` [rows, row_bytes] to float32 [rows, columns] (type_traits.to_float)."""
    number = _ggml_type(type_name)
    source = np.ascontiguousarray(blocks, dtype=np.uint8)
    row_bytes = _row_bytes(type_name, columns)
    if source.ndim != 2 or source.shape[1] != row_bytes:
        raise ValueError(f"{type_name} rows of {columns} columns take {row_bytes} bytes, got shape {source.shape}")
    if number == GGML_TYPES["f32"]:  # the one type without a to_float
        return source.view(np.float32).copy()
    traits = _ggml().ggml_get_type_traits(number).contents
    target = np.empty((source.shape[0], columns), dtype=np.float32)
    traits.to_float(source.ctypes.data, target.ctypes.data, target.size)
    return target


def quantize(
    source: str | Path,
    target: str | Path,
    ftype: str,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    tensor_types: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> None:
    """llama.cpp's own quantizer (llama_model_quantize) from a float GGUF `source` to `target`.

    `ftype` names a mixture of `FTYPES` ("q4_k_m"). `imatrix` maps gguf names to float32 [columns], or
    [experts, columns] for stacked experts. `tensor_types` maps exact gguf names to ggml types and overrides the
    mixture; llama.cpp's fallback for rows that do not divide still applies. CompressError with llama.cpp's reason.
    """
    api = llama_api()
    if ftype.lower() not in FTYPES:
        raise ValueError(f"{ftype!r} is no llama.cpp mixture; known: {', '.join(FTYPES)}")
    params = api.llama_model_quantize_default_params()
    params.ftype = FTYPES[ftype.lower()]
    params.nthread = threads or default_threads()
    keep: list[Any] = []  # what the C structs point at
    if imatrix:
        entries = (api.llama_model_imatrix_data * (len(imatrix) + 1))()  # a NULL name ends the list
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            data = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
            keep.append(data)
            entry.name = name.encode()
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = data.size
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
        keep.append(entries)
    if tensor_types:
        overrides = (api.llama_model_tensor_override * (len(tensor_types) + 1))()
        for override, (name, type_name) in zip(overrides, tensor_types.items(), strict=False):
            override.pattern = f"^{re.escape(name)}$".encode()
            override.type = _ggml_type(type_name)
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(api.llama_model_tensor_override))
        keep.append(overrides)
    log.errors = []
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise CompressError(f"llama.cpp could not quantize {source}: {log.reason()}")
    if not Path(target).exists():
        raise OutputError(f"llama.cpp reported success but wrote no {target}; check the disk")
