"""What benchmarks over recipes share: a case, how it is run, what is read from its scorecard."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.models.gguf.dither import dither
from compress.models.gguf.header import is_gguf
from compress.models.gguf.source import model_name
from compress.models.locate import model_location

ROOT = Path(__file__).resolve().parents[1]
TOY = "models/tiny-qwen3-moe"


@dataclass(frozen=True)
class Case:
    """One row: its group in the table, its label, the recipe and what differs from it."""

    group: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What one case measured. kl: mean and the ends of its interval, nats a token; ratio: of perplexities;
    folder: the artifact; fallbacks: codecs that were wanted and are not there, in words."""

    case: Case
    bits: float
    expert_bits: float
    bytes: int
    kl: tuple[float, float, float]
    perplexity: float
    ratio: float
    top1: float
    seconds: float
    folder: Path
    fallbacks: str = ""


def measure(case: Case, samples: int, suite: Path, folder: Path, model: str | None = None) -> Row:
    """Run one case, on the recipe's own model or another, and read its scorecard."""
    settings = [*case.overrides, f"calibration.samples={samples}", f"score.suite={suite}"]
    output = folder / re.sub(r"\W+", "-", f"{case.group} {case.label}")
    command = [sys.executable, "-m", "compress.cli"]
    sets = [part for setting in settings for part in ("--set", setting)]
    sets += ["--model", model] if model else []
    plan = subprocess.run(
        [*command, "plan", case.recipe, *sets, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if plan.returncode:
        raise SystemExit(f"{case.label}: {plan.stderr.strip() or plan.stdout.strip()}")
    planned = json.loads(plan.stdout)["tensors"]
    tensors = [t for t in planned if t["role"].startswith(("routed_experts", "mlp"))]
    weights = sum(t["shape"][0] * t["shape"][1] for t in tensors)
    started = time.perf_counter()
    run = subprocess.run(
        [*command, "run", case.recipe, *sets, "--output", str(output), "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if run.returncode:
        raise SystemExit(f"{case.label}: {run.stderr.strip() or run.stdout.strip()}")
    card = json.loads((output / "scorecard.json").read_text())
    artifact = card["artifacts"][0]
    scores = artifact["scores"]
    return Row(
        case,
        artifact["bits_per_weight"],
        8 * sum(t["bytes"] for t in tensors) / weights,
        artifact["bytes"],
        (scores["kld"]["mean"], scores["kld"]["low"], scores["kld"]["high"]),
        scores["perplexity"]["value"],
        scores["perplexity_ratio"]["value"],
        scores["top1_agreement"]["value"],
        seconds,
        output / artifact["path"],
        fallen_back(planned),
    )


def fallen_back(planned: list[dict[str, Any]]) -> str:
    """Which codecs of a plan stand in for others, and how often."""
    counted = Counter(f"{t['wanted']} -> {t['codec']}" for t in planned if t["wanted"])
    return ", ".join(f"{change} ({count} of {len(planned)} tensors)" for change, count in counted.items())


def original(model: str, folder: Path) -> str:
    """What a benchmark takes for the original: a folder as it is, a GGUF file or packaged model with seeded noise of half a step
    on its quantized weights, written to `folder`."""
    location = Path(model_location(model))
    if not is_gguf(location):
        return model
    return str(dither(location, folder / f"{model_name(location)}-dithered", seed=0))


def median_ratio(call: Callable[[], object], reference: Callable[[], object], rounds: int = 15) -> float:
    """Time of a call over that of another; both take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for function, own in zip((call, reference), times, strict=True):
            started = time.perf_counter()
            function()
            if number:
                own.append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


def arguments(description: str) -> ArgumentParser:
    """What every benchmark over recipes can be told."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=60, help="scored windows of 512 tokens")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--model", default=TOY, help="a folder, or smollm2-135m: a real model of 135M, dithered")
    parser.add_argument("--only", default="", help="regular expression of `group: label`")
    parser.add_argument("--markdown", type=Path, help="also write the table here, after every case")
    return parser


@contextmanager
def scratch_suite(text: str, windows: int) -> Iterator[tuple[Path, Path]]:
    """A folder for outputs and the file of a suite that scores so many windows of 512 tokens, no tasks."""
    with TemporaryDirectory(prefix="compress-benchmark-") as scratch:
        suite = Path(scratch) / "suite.yaml"
        suite.write_text(f"name: benchmark\ndescription: benchmark\ntext: {text}\nwindows: {windows}\nlength: 512\n")
        yield Path(scratch), suite
