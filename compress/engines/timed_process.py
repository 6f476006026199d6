"""One measurement of an engine's throughput: `python -m compress.engines.timed_process` times what a `Request`, as JSON on
standard input, asks for, and prints the figures of `Timing` as JSON.

Engines run as they do for people: llama.cpp with its own defaults, transformers in the folder's float type. Little is
imported, since all of it counts as the engine's memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.engines.llama_api import llama_api, log
from compress.errors import CheckpointError, CompressError


@dataclass(frozen=True)
class Request:
    """engine: a key of `RUNNERS`; repack: whether llama.cpp may reorder weights for its kernels."""

    engine: str
    files: list[str]
    prompt: list[int]
    generated: int
    threads: int
    repack: bool


class Runner(Protocol):
    """A loaded model. `imports` is called before the clock starts."""

    @staticmethod
    def imports() -> None:
        """Load the engine itself."""
        ...

    def feed(self, tokens: Sequence[int]) -> int:
        """Read tokens behind those read before; the most probable next one."""
        ...

    def forget(self) -> None:
        """Start from an empty context."""
        ...


class _LlamaCpp:
    @staticmethod
    def imports() -> None:
        llama_api()

    def __init__(self, request: Request):
        self.api = api = llama_api()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = request.repack
        self.model = api.llama_model_load_from_file(os.fsencode(request.files[0]), params)
        if not self.model:
            raise CheckpointError(f"llama.cpp cannot load it: {log.reason()}")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        settings = api.llama_context_default_params()
        settings.n_ctx = len(request.prompt) + request.generated + 1
        settings.n_threads = settings.n_threads_batch = request.threads
        settings.no_perf = True
        self.batch = settings.n_batch
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise CompressError(f"llama.cpp cannot open a context of {settings.n_ctx} tokens: {log.reason()}")

    def feed(self, tokens: Sequence[int]) -> int:
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            ids = (self.api.llama_token * len(part))(*part)  # the batch points into it
            code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(part)))
            if code != 0:
                raise CompressError(f"llama.cpp failed to decode (code {code}): {log.reason()}")
        row = self.api.llama_get_logits_ith(self.context, -1)
        logits = ctypes.cast(row, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
        return int(np.frombuffer(logits, np.float32).argmax())

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


class _Transformers:
    @staticmethod
    def imports() -> None:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

    def __init__(self, request: Request):
        import torch
        import transformers

        torch.set_num_threads(request.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder = Path(request.files[0]).parent
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        self.torch, self.model = torch, loaded.eval()
        self.cache: Any = None

    def feed(self, tokens: Sequence[int]) -> int:
        with self.torch.inference_mode():
            out = self.model(
                input_ids=self.torch.tensor([list(tokens)]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def forget(self) -> None:
        self.cache = None


RUNNERS: Mapping[str, type[_LlamaCpp] | type[_Transformers]] = {"llama.cpp": _LlamaCpp, "transformers": _Transformers}
"""By the name that a container's engine has."""


def timed(request: Request) -> dict[str, float]:
    """The fields of `compress.scoring.speed.Timing`."""
    engine = RUNNERS[request.engine]
    engine.imports()
    started = time.perf_counter()
    runner: Runner = engine(request)
    loaded = time.perf_counter()
    token = runner.feed(request.prompt)
    first = time.perf_counter()
    runner.forget()  # the first prompt also brought the weights into memory
    again = time.perf_counter()
    token = runner.feed(request.prompt)
    read = time.perf_counter()
    for _ in range(request.generated):
        token = runner.feed([token])
    ended = time.perf_counter()
    return {
        "load": loaded - started,
        "first_token": first - loaded,
        "prompt": len(request.prompt) / (read - again),
        "generation": request.generated / (ended - read),
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """Largest resident memory. Linux's ru_maxrss begins with that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Time what standard input asks for, and print the timing as JSON."""
    try:
        found = timed(Request(**json.load(sys.stdin)))
    except CompressError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
