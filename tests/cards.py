"""Scorecards made by hand, and what a terminal shows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from compress.report.scorecard import Artifact, Base, Check, Experts, Gate, LayerError, Scorecard, Stage
from compress.scoring.divergence import Divergence, Interval, Scores
from compress.scoring.results import Fallback, Flips, Speed, Spread, TaskScore


def scores(perplexity: float, kld: float, digest: str = "0123456789abcdef") -> Scores:
    """Against an original with a perplexity of 36.6, in llama.cpp."""
    return Scores(
        perplexity=Interval(perplexity, perplexity - 1, perplexity + 1),
        base_perplexity=Interval(36.6, 34.0, 39.4),
        perplexity_ratio=Interval(perplexity / 36.6, perplexity / 36.6 - 0.01, perplexity / 36.6 + 0.01),
        kld=Divergence(kld, kld * 0.9, kld * 1.1, kld / 2, kld * 8, kld * 20, kld * 50),
        top1_agreement=Interval(0.91, 0.90, 0.92),
        tokens=20440, windows=40, window_length=512, stride=512,
        engine="llama.cpp", tokenizer="tiny", text_digest=digest,
    )  # fmt: skip


def card(name: str, size: int, kld: float | None, *, passed: bool = True, **changes: Any) -> Scorecard:
    """One GGUF of 22 MB; a KL divergence with 10% to each side, or no scores."""
    scored = None if kld is None else scores(37.4, kld)
    artifact = Artifact(container="gguf", path=f"{name}.gguf", bytes=size, bits_per_weight=3.12, scores=scored)
    values = {
        "model": "models/tiny",
        "recipe": name,
        "artifacts": (artifact,),
        "base": Base(bytes=22_000_000, bits_per_weight=16, scores=scores(36.6, 0).of_reference()),
        "gate": Gate(passed=passed, checks=(Check(name="reload", passed=passed, detail="1e-6 of 1e-4"),)),
        "stages": (
            Stage(name="blocks", seconds=61.5, peak_bytes=900_000_000),
            Stage(name="score", seconds=3),
        ),
        "experts": (Experts(layer=0, tokens=(5, 100, 300), cold=(0,), borrowed=(0.9, 0.0, 0.0)),),
        "fallbacks": (Fallback(subject="a.weight", wanted="q2_k", used="q4_0", reason="row of 96"),),
    }
    return Scorecard(**{**values, **changes})


def text(renderable: Any, width: int = 100) -> str:
    """What a terminal of so many columns shows."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def task(value: float, change: float, n: int = 100, half: float = 0.03) -> TaskScore:
    """An accuracy, its change against the original, and the flips behind it: a hundredth gained."""
    lost = 0.01 - change
    return TaskScore(
        metric="acc", value=value, low=value - 0.05, high=value + 0.05, n=n,
        difference={"value": change, "low": change - half, "high": change + half},
        flips=Flips(n=n, lost=Interval(lost, lost - 0.01, lost + 0.01), gained=Interval(0.01, 0.0, 0.02)),
    )  # fmt: skip


def speed(generation: float, ratio: float) -> Speed:
    """Tokens per second, and as a multiple of the original's."""

    def around(value: float) -> Spread:
        return Spread(median=value, low=0.9 * value, high=1.1 * value)

    return Speed(
        engine="llama.cpp", threads=2, prompt_tokens=256, generated_tokens=64, repetitions=5,
        prompt=around(10 * generation), generation=around(generation), first_token=around(0.5), load=around(0.1),
        peak_bytes=30_000_000, ratio={"generation": around(ratio), "prompt": around(ratio)},
    )  # fmt: skip


def full_card(name: str, size: int, kld: float, **changes: Any) -> Scorecard:
    """The same with tasks, speed and errors of layers: all that a comparison shows."""
    plain = card(name, size, kld)
    tasks = {"blimp": task(0.6, -0.02), "lambada": task(0.3, -0.04), "blimp.island_effects": task(0.5, 0.0, 10)}
    artifact = plain.artifacts[0].model_copy(update={"tasks": tasks, "speed": speed(80, 2.0)})
    before = {key: found.model_copy(update={"difference": None, "flips": None}) for key, found in tasks.items()}
    errors = tuple(
        LayerError(layer=layer, role=role, codec="q4_k", error=kld * (layer + 1) / 10, parameters=65536)
        for layer in range(3)
        for role in ("attention.q", "routed_experts.down")
    )
    values = {
        "artifacts": (artifact,),
        "base": plain.base.model_copy(update={"tasks": before, "speed": speed(40, 1.0)}),
        "errors": (LayerError(layer=None, role="embeddings", codec="q8_0", error=1e-5, parameters=1000), *errors),
        "calibration": {"dataset": "mixed", "samples": 4, "length": 64},
        "versions": {"compress": "0.1.0"},
        "suite": "quick",
    }
    return plain.model_copy(update={**values, **changes})
