"""llama.cpp itself, through llama-cpp-python's low-level ctypes interface.

Three uses: `LlamaCpp` scores a GGUF with the engine that will run it, `quantize` is llama.cpp's own quantizer (the
baseline of the benchmarks), `quantize_rows`/`dequantize_rows` are ggml's C code (the oracle of the codecs).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from compress.engines.llama_api import GGML_TYPES, default_threads, llama_api, log
from compress.engines.sampling import Choose, likeliest, until
from compress.errors import CheckpointError, CompressError

_UBATCH_LOGIT_BYTES = 64 << 20  # logits of one decode call; bounds memory for vocabularies of 150k
_MAX_BATCH = 512


class LlamaCpp:
    """A GGUF file run by llama.cpp on the CPU: logits of whole sequences, greedy text. A LogitSource.

    `path` is a GGUF file, or the first of a split set; vocabulary_only: nothing is read of it but what turns text into ids; context:
    tokens that there is room for from the beginning when text is continued.
    Accuracy over speed: float32 KV cache, no flash attention.
    CheckpointError if llama.cpp refuses the file, MissingExtra without llama-cpp-python. Close it, or use `with`.
    """

    name = "llama.cpp"

    def __init__(
        self, path: str | Path, *, threads: int | None = None, vocabulary_only: bool = False, context: int = 0
    ) -> None:
        self._model = self._context = None
        self._context_size = 0
        self._at_least = context
        self._placed: list[int] = []
        self._api = api = llama_api()
        self._threads = threads or default_threads()
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no GGUF file at {self.path}")
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = False  # the AMX repacking of some builds crashes on virtual machines
        if hasattr(params, "load_mode"):
            params.load_mode = api.LLAMA_LOAD_MODE_MMAP
        else:
            params.use_mmap = True
        log.errors = []
        self._model = api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {self.path}: {log.reason()}")
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
            log.errors = []
            self._context = self._api.llama_init_from_model(self._model, params)
            if not self._context:
                raise CompressError(
                    f"llama.cpp cannot open a context of {tokens} tokens: {log.reason()}; use shorter sequences"
                )
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._placed = []

    def _decode(self, tokens: np.ndarray, start: int, outputs: int) -> np.ndarray:
        """Logits float32 [outputs, vocab] of the last `outputs` of `tokens`, which are placed at `start`."""
        count = len(tokens)
        batch = self._api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(tokens.tolist()):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = index >= count - outputs
            log.errors = []
            code = self._api.llama_decode(self._context, batch)
            if code != 0:
                raise CompressError(f"llama.cpp failed to decode {self.path} (code {code}): {log.reason()}")
        finally:
            self._api.llama_batch_free(batch)
        if outputs == 0:
            return np.empty((0, self.vocab_size), np.float32)
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
        return self.tails(sequences, [len(sequence) for sequence in sequences])

    def tails(self, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> Iterator[np.ndarray]:
        """See Tails.tails."""
        longest = max((len(sequence) for sequence in sequences), default=0)
        for sequence, count in zip(sequences, counts, strict=True):
            tokens = self._check(sequence)
            self._open_context(longest)
            parts = []
            for start in range(0, len(tokens), self._batch):
                part = tokens[start : start + self._batch]
                behind = len(tokens) - start - len(part)  # tokens of later parts
                parts.append(self._decode(part, start, min(len(part), max(0, count - behind))))
            yield np.concatenate(parts)

    def tokenize(self, text: str, *, special: bool = False, ends: bool | None = None) -> np.ndarray:
        """Token ids int64 of `text` by llama.cpp's tokenizer; `special` reads special tokens written in the text, `ends`
        (by default as `special`) adds BOS/EOS as the file says."""
        ends = special if ends is None else ends
        data = text.encode()
        size = len(data) + 8
        buffer = (self._api.llama_token * size)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, size, ends, special)
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

    def continuation(self, prompt: np.ndarray, most: int, stop: Callable[[Sequence[int]], bool]) -> list[int]:
        """See Generates.continuation; with llama.cpp's cache."""
        return until(self.stream(prompt, most, likeliest), stop)

    def stream(self, prompt: np.ndarray, most: int, choose: Choose, *, reuse: bool = False) -> Iterator[int]:
        """See Speaks.stream."""
        tokens = self._check(prompt)
        known = self._reused(tokens, most) if reuse else 0
        if not known:
            self._open_context(max(len(tokens) + most, self._at_least))
        del self._placed[known:]
        for start in range(known, len(tokens), self._batch):
            part = tokens[start : start + self._batch]
            last = self._decode(part, start, 1)
            self._placed += part.tolist()
        produced: list[int] = []
        while len(produced) < most:
            token = choose(last[0], self._placed)
            if self._api.llama_vocab_is_eog(self._vocab, token):
                break
            produced.append(token)
            yield token
            if len(produced) == most:
                break
            last = self._decode(np.array([token]), len(tokens) + len(produced) - 1, 1)
            self._placed.append(token)

    def _reused(self, tokens: np.ndarray, most: int) -> int:
        """How many of the first tokens the cache holds already, the last one never; what is behind them is dropped. 0 where
        the context is too small for all, or the model's states cannot be taken back."""
        if self._context is None or len(tokens) + most > self._context_size:
            return 0
        pairs = enumerate(zip(self._placed, tokens[:-1].tolist(), strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(self._placed), len(tokens) - 1))
        memory = self._api.llama_get_memory(self._context)
        return same if same and self._api.llama_memory_seq_rm(memory, 0, same, -1) else 0

    @property
    def begins(self) -> tuple[int, ...]:
        """The ids that a text begins with: BOS, or nothing."""
        adds = self._api.llama_vocab_get_add_bos(self._vocab)
        return (int(self._api.llama_vocab_bos(self._vocab)),) if adds else ()

    @property
    def trained_context(self) -> int:
        """Tokens that the model was trained to read at once."""
        return int(self._api.llama_model_n_ctx_train(self._model))

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Greedy continuation of `prompt`, without the prompt; stops at an end-of-generation token."""
        return self.detokenize(
            self.continuation(self.tokenize(prompt, special=True), max_tokens, lambda produced: False)
        )
