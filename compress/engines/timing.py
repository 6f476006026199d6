"""Throughput of an engine: prompt and generated tokens a second, time to first token, load time, peak memory.

Every measurement is a process of its own (`python -m compress.engines.timing`, a `_Request` as JSON on its standard input), so
that loading and memory are this model's alone, and models take turns, so that a busy machine slows all of them alike.
Engines run as they do for people: llama.cpp with its own defaults, transformers in the folder's float type.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.engines.llama_api import default_threads, llama_api, log
from compress.errors import CheckpointError, CompressError
from compress.report.progress import peak_memory_bytes
from compress.scoring.speed import Timing

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A model to be timed. engine: a key of `RUNNERS`; files: its weight files, the first one first."""

    engine: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Request:
    engine: str
    files: list[str]
    prompt: list[int]
    generated: int
    threads: int
    repack: bool


def time_in_turns(
    jobs: Mapping[str, Job],
    prompt: Sequence[int],
    *,
    generated: int,
    repetitions: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, list[Timing]]:
    """Timings of every job, `repetitions` each, in turns. prompt: token ids that every model reads; generated: tokens that
    each then adds, greedily, whatever they are. CompressError where an engine fails."""
    threads = default_threads()
    found: dict[str, list[Timing]] = {name: [] for name in jobs}
    for turn in range(repetitions):
        for number, (name, job) in enumerate(jobs.items()):
            request = _Request(job.engine, [str(file) for file in job.files], list(prompt), generated, threads, True)
            found[name].append(_in_own_process(request))
            progress(turn * len(jobs) + number + 1, repetitions * len(jobs))
    return found


def _in_own_process(request: _Request) -> Timing:
    # The AMX repacking of some builds of llama.cpp crashes on virtual machines: then once more without.
    for asked in (request, _Request(**{**asdict(request), "repack": False})):
        done = subprocess.run(
            [sys.executable, "-m", "compress.engines.timing"],
            input=json.dumps(asdict(asked)), capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(request.threads)},
        )  # fmt: skip
        if done.returncode >= 0:
            break
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise CompressError(f"{request.engine} could not be timed on {Path(request.files[0]).name}: {reason}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------- within that process


class _Runner(Protocol):
    def feed(self, tokens: Sequence[int]) -> int:
        """Read tokens behind those read before; the most probable next one."""
        ...

    def forget(self) -> None:
        """Start from an empty context."""
        ...


class _LlamaCpp:
    def __init__(self, request: _Request):
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
    def __init__(self, request: _Request):
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


RUNNERS: Mapping[str, Callable[[_Request], _Runner]] = {"llama.cpp": _LlamaCpp, "transformers": _Transformers}
"""By the name that a container's engine has."""


def _timed(request: _Request) -> Timing:
    started = time.perf_counter()
    runner = RUNNERS[request.engine](request)
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
    return Timing(
        load=loaded - started,
        first_token=first - loaded,
        prompt=len(request.prompt) / (read - again),
        generation=request.generated / (ended - read),
        peak_bytes=peak_memory_bytes(),
    )


def main() -> None:
    """Time what standard input asks for, and print the timing as JSON."""
    try:
        timing = _timed(_Request(**json.load(sys.stdin)))
    except CompressError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(asdict(timing)) + "\n")


if __name__ == "__main__":
    main()
