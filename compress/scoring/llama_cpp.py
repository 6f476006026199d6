"""llama.cpp itself, through llama-cpp-python's low-level ctypes interface.

Three uses: `LlamaCpp` scores a GGUF with the engine that will run it, `quantize` is llama.cpp's own quantizer (the
baseline of the benchmarks), `quantize_rows`/`dequantize_rows` are ggml's C code (the oracle of the codecs).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from compress.errors import CheckpointError, CompressError, MissingExtra, OutputError

# enum ggml_type (ggml.h); the names are this project's codec names.
GGML_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12,
    "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21,
    "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29, "bf16": 30, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39,
}  # fmt: skip

# enum llama_ftype (llama.h): the mixtures of `llama-quantize`.
FTYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20,
    "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28,
    "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37,
    "mxfp4_moe": 38,
}  # fmt: skip

_GGML_LOG_ERROR = 4
_GGML_LOG_CONT = 5
_UBATCH_LOGIT_BYTES = 64 << 20  # logits of one decode call; bounds memory for vocabularies of 150k
_MAX_BATCH = 512


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


class _Log:
    """Receives llama.cpp's log in place of stderr and keeps the last error lines for our own messages."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        self._level = level if level != _GGML_LOG_CONT else self._level
        line = text.decode("utf-8", "replace").strip()
        if self._level == _GGML_LOG_ERROR and line:
            self.errors = [*self.errors[-7:], line]

    def reason(self) -> str:
        """The last error, as one line for a message; empties the memory."""
        lines, self.errors = self.errors, []
        text = " ".join(word for line in lines for word in line.split() if word.strip("=-"))
        return text[-300:] or "llama.cpp gave no reason"


_log = _Log()


@functools.cache
def _api() -> ModuleType:
    """llama_cpp.llama_cpp with its backend started and its log silenced; MissingExtra without the package."""
    try:
        from llama_cpp import llama_cpp as api
    except ImportError as error:
        raise MissingExtra("llama-cpp-python", "llama", "running GGUF files in llama.cpp") from error
    callback = api.llama_log_callback(_log)
    api._compress_log_callback = callback  # the C side keeps the pointer: it must outlive every call
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    return api


@functools.cache
def _ggml() -> ctypes.CDLL:
    """libggml-base with the signatures of the functions used here; MissingExtra without llama-cpp-python."""
    api = _api()
    folder = Path(api.__file__).parent / "lib"
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
    output_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    threads: int | None = None,
) -> None:
    """llama.cpp's own quantizer (llama_model_quantize) from a float GGUF `source` to `target`.

    `ftype` names a mixture of `FTYPES` ("q4_k_m"). `imatrix` maps gguf names to float32 [columns], or
    [experts, columns] for stacked experts. `tensor_types` maps exact gguf names to ggml types and overrides the
    mixture; llama.cpp's fallback for rows that do not divide still applies. CompressError with llama.cpp's reason.
    """
    api = _api()
    if ftype.lower() not in FTYPES:
        raise ValueError(f"{ftype!r} is no llama.cpp mixture; known: {', '.join(FTYPES)}")
    params = api.llama_model_quantize_default_params()
    params.ftype = FTYPES[ftype.lower()]
    params.nthread = threads or _threads()
    params.pure = pure
    if output_type:
        params.output_tensor_type = _ggml_type(output_type)
    if token_embedding_type:
        params.token_embedding_type = _ggml_type(token_embedding_type)
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
    _log.errors = []
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise CompressError(f"llama.cpp could not quantize {source}: {_log.reason()}")
    if not Path(target).exists():
        raise OutputError(f"llama.cpp reported success but wrote no {target}; check the disk")


class LlamaCpp:
    """A GGUF file run by llama.cpp on the CPU: logits of whole sequences, greedy text. A LogitSource.

    `path` is a GGUF file, or the first of a split set. Accuracy over speed: float32 KV cache, no flash attention.
    CheckpointError if llama.cpp refuses the file, MissingExtra without llama-cpp-python. Close it, or use `with`.
    """

    name = "llama.cpp"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self._model = self._context = None
        self._context_size = 0
        self._api = api = _api()
        self._threads = threads or _threads()
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no GGUF file at {self.path}")
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # the AMX repacking of some builds crashes on virtual machines
        if hasattr(params, "load_mode"):
            params.load_mode = api.LLAMA_LOAD_MODE_MMAP
        else:
            params.use_mmap = True
        _log.errors = []
        self._model = api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {self.path}: {_log.reason()}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocab_size = int(api.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(TypeError):  # at the interpreter's exit the library may already be gone
            self.close()

    def close(self) -> None:
        """Free the model and its context; safe to call twice."""
        self._close_context()
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def _close_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def _open_context(self, tokens: int) -> None:
        """A context that holds at least `tokens`, emptied."""
        if self._model is None:
            raise ValueError(f"{self.path} is closed")
        if self._context is None or self._context_size < tokens:
            self._close_context()
            params = self._api.llama_context_default_params()
            params.n_ctx = self._context_size = tokens
            params.n_batch = params.n_ubatch = self._batch = max(
                1, min(tokens, _MAX_BATCH, _UBATCH_LOGIT_BYTES // (4 * self.vocab_size))
            )
            params.n_threads = params.n_threads_batch = self._threads
            params.type_k = params.type_v = GGML_TYPES["f32"]
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.no_perf = True
            _log.errors = []
            self._context = self._api.llama_init_from_model(self._model, params)
            if not self._context:
                raise CompressError(
                    f"llama.cpp cannot open a context of {tokens} tokens: {_log.reason()}; use shorter sequences"
                )
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, tokens: np.ndarray, start: int, *, every: bool) -> np.ndarray:
        """Logits float32 [n, vocab] of `tokens` placed at `start`: of all of them, or of the last one."""
        count = len(tokens)
        batch = self._api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(tokens.tolist()):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = every or index == count - 1
            _log.errors = []
            code = self._api.llama_decode(self._context, batch)
            if code != 0:
                raise CompressError(f"llama.cpp failed to decode {self.path} (code {code}): {_log.reason()}")
        finally:
            self._api.llama_batch_free(batch)
        outputs = count if every else 1
        pointer = ctypes.cast(self._api.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape=(outputs, self.vocab_size)).copy()

    def _check(self, sequence: np.ndarray) -> np.ndarray:
        tokens = np.asarray(sequence, dtype=np.int64).reshape(-1)
        if len(tokens) == 0:
            raise ValueError("a sequence without tokens")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"token {tokens.max()} is outside the vocabulary of {self.vocab_size}")
        return tokens

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Float32 [len(sequence), vocab] per sequence of token ids, in order, one at a time.

        Every sequence starts from an empty cache; no token is added. Row t is the prediction of token t + 1.
        """
        longest = max((len(sequence) for sequence in sequences), default=0)
        for sequence in sequences:
            tokens = self._check(sequence)
            self._open_context(longest)
            parts = [
                self._decode(tokens[start : start + self._batch], start, every=True)
                for start in range(0, len(tokens), self._batch)
            ]
            yield np.concatenate(parts)

    def tokenize(self, text: str, *, special: bool = False) -> np.ndarray:
        """Token ids int64 of `text` by llama.cpp's tokenizer; `special` adds BOS/EOS as the file says and reads
        special tokens written in the text."""
        data = text.encode()
        size = len(data) + 8
        buffer = (self._api.llama_token * size)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, size, special, special)
        if count < 0:
            raise CompressError(f"llama.cpp could not tokenize {len(data)} bytes of text")
        return np.array(buffer[:count], dtype=np.int64)

    def detokenize(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens left out."""
        ids = (self._api.llama_token * max(len(tokens), 1))(*[int(token) for token in tokens])
        size = 64 + 16 * len(tokens)
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            count = self._api.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, False)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count
        raise CompressError("llama.cpp could not turn tokens into text")

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Greedy continuation of `prompt`, without the prompt; stops at an end-of-generation token."""
        tokens = self._check(self.tokenize(prompt, special=True))
        self._open_context(len(tokens) + max_tokens)
        for start in range(0, len(tokens), self._batch):
            last = self._decode(tokens[start : start + self._batch], start, every=False)
        produced: list[int] = []
        while len(produced) < max_tokens:
            token = int(last[0].argmax())
            if self._api.llama_vocab_is_eog(self._vocab, token):
                break
            produced.append(token)
            last = self._decode(np.array([token]), len(tokens) + len(produced) - 1, every=False)
        return self.detokenize(produced)


def _threads() -> int:
    """The cores we may use, or fewer if OMP_NUM_THREADS says so: llama.cpp's threads wait for each other by spinning,
    which on cores shared with others is many times slower than one thread."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(wanted), cores) if wanted.isdigit() and int(wanted) > 0 else cores
