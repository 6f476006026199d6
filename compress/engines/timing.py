"""Throughput of engines: prompt and generated tokens a second, time to first token, load time, peak memory.

Every measurement is a process of its own (`timed_process`), so that loading and memory are one model's alone, and models take
turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from compress.containers import TRANSFORMERS, Container, original_layout
from compress.engines.llama_api import default_threads
from compress.engines.open import file_container, why_not
from compress.engines.timed_process import Request
from compress.errors import CompressError
from compress.scoring.results import Fallback, Speed
from compress.scoring.speed import Timing, summarise
from compress.text import Suite, Tokenizer, eval_windows

Progress = Callable[[int, int], None]
PROMPT_TOKENS, GENERATED_TOKENS, REPETITIONS = 256, 32, 5
ORIGINAL = "original"
"""Its name among those that take turns."""


@dataclass(frozen=True)
class Job:
    """A model to be timed. engine: a key of `RUNNERS`; files: its weight files, the first one first; why_not: why it is
    not run here, or None."""

    engine: str
    files: tuple[Path, ...]
    why_not: str | None = None

    @classmethod
    def of(cls, container: Container, files: Sequence[Path], parameters: int) -> Job:
        """An artifact in the engine that people run it with: its container's, else transformers."""
        engine = container.engine or TRANSFORMERS
        return cls(engine.name, tuple(files), why_not(engine, parameters))

    @classmethod
    def of_original(cls, files: Sequence[Path], parameters: int) -> Job:
        """A dense model as it came: in its file's engine, else in transformers."""
        return cls.of(file_container(str(files[0])) or original_layout(), files, parameters)


@dataclass(frozen=True)
class Timed:
    """Throughput of several models and of their original by one measurement; lost: a line for each that was not timed."""

    speeds: Mapping[str, Speed]
    original: Speed | None
    lost: Mapping[str, Fallback]

    def lines(self, *names: str) -> list[Fallback]:
        """What of these, and of the original, was not timed."""
        return [line for name, line in self.lost.items() if name in (ORIGINAL, *names)]


def speed_prompt(suite: Suite, tokenizer: Tokenizer, max_positions: int) -> list[int]:
    """The first tokens of a suite's first text, as many as all models read."""
    text = next(iter(suite.texts.values()))
    windows = eval_windows(text.text, tokenizer, windows=text.windows, protocol=text.protocol)
    room = max_positions - GENERATED_TOKENS
    return [int(index) for index in windows.tokens.reshape(-1)[: max(1, min(PROMPT_TOKENS, room))]]


def time_models(
    jobs: Mapping[str, Job],
    original: Job | None,
    prompt: Sequence[int],
    *,
    repetitions: int = REPETITIONS,
    progress: Progress = lambda done, total: None,
) -> Timed:
    """Throughput of every job, and of the original, which takes its turn with them. prompt: token ids that all read."""
    wanted = {**({ORIGINAL: original} if original is not None else {}), **jobs}
    lost = {name: job.why_not for name, job in wanted.items() if job.why_not is not None}
    possible = {name: job for name, job in wanted.items() if name not in lost}
    timings, failed = time_in_turns(
        possible, prompt, generated=GENERATED_TOKENS, repetitions=repetitions, progress=progress
    )
    lost |= failed
    facts = {"threads": default_threads(), "prompt": len(prompt), "generated": GENERATED_TOKENS}
    before = timings.get(ORIGINAL, [])
    speeds = {
        name: summarise(found, before if name != ORIGINAL else (), engine=possible[name].engine, **facts)
        for name, found in timings.items()
    }
    return Timed(
        {name: speed for name, speed in speeds.items() if name in jobs},
        speeds.get(ORIGINAL) if original is not None else None,
        {
            name: Fallback(
                subject=Path(name).name, wanted=f"timed in {wanted[name].engine}", used="not timed", reason=reason
            )
            for name, reason in lost.items()
        },
    )


def time_in_turns(
    jobs: Mapping[str, Job],
    prompt: Sequence[int],
    *,
    generated: int,
    repetitions: int,
    progress: Progress = lambda done, total: None,
) -> tuple[dict[str, list[Timing]], dict[str, str]]:
    """Timings of every job, `repetitions` each, in turns, and why an engine failed on one. prompt: token ids that every
    model reads; generated: tokens that each then adds, greedily, whatever they are."""
    threads = default_threads()
    found: dict[str, list[Timing]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    for turn in range(repetitions):
        for number, (name, job) in enumerate(jobs.items()):
            request = Request(job.engine, [str(file) for file in job.files], list(prompt), generated, threads, True)
            try:
                if name in found:
                    found[name].append(_in_own_process(request))
            except CompressError as error:
                del found[name]
                failed[name] = str(error)
            progress(turn * len(jobs) + number + 1, repetitions * len(jobs))
    return found, failed


def _in_own_process(request: Request) -> Timing:
    # The AMX repacking of some builds of llama.cpp crashes on virtual machines: then once more without.
    for asked in (request, replace(request, repack=False)):
        done = subprocess.run(
            [sys.executable, "-m", "compress.engines.timed_process"],
            input=json.dumps(asdict(asked)), capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(request.threads)},
        )  # fmt: skip
        if done.returncode >= 0:
            break
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise CompressError(f"{request.engine} could not be timed on {Path(request.files[0]).name}: {reason}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))
