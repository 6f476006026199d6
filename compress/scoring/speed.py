"""Throughput as a scorecard has it: medians and spread over repetitions, and ratios to the original in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from compress.scoring.results import Speed, Spread

SECONDS, RATES = ("load", "first_token"), ("prompt", "generation")


@dataclass(frozen=True)
class Timing:
    """One repetition. load, first_token: seconds, to a loaded model and from there to the first token behind the prompt;
    prompt, generation: tokens a second, weights in memory; peak_bytes: resident memory of the whole process."""

    load: float
    first_token: float
    prompt: float
    generation: float
    peak_bytes: int


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of the repetitions."""
    return Spread(median=median(values), low=min(values), high=max(values))


def summarise(
    timings: Sequence[Timing],
    original: Sequence[Timing] = (),
    *,
    engine: str,
    threads: int,
    prompt: int,
    generated: int,
) -> Speed:
    """What the repetitions of a model say, beside those of its original that took turns with them.

    prompt, generated: numbers of tokens. Ratios pair the repetitions of one turn; of a model to its original, so above 1 is
    faster for rates, slower for seconds, more for memory.
    """
    fields = (*SECONDS, *RATES, "peak_bytes")
    ratio = {
        name: spread([getattr(a, name) / getattr(b, name) for a, b in zip(timings, original, strict=True)])
        for name in (fields if original else ())
    }
    return Speed(
        engine=engine,
        threads=threads,
        prompt_tokens=prompt,
        generated_tokens=generated,
        repetitions=len(timings),
        peak_bytes=max(timing.peak_bytes for timing in timings),
        ratio=ratio,
        **{name: spread([getattr(timing, name) for timing in timings]) for name in (*SECONDS, *RATES)},
    )
