"""From finished codes to delivered artifacts: write, read back, score, pass the gate, rename.

Nothing gets its final name before every check has passed; what fails lies in `rejected/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import __version__
from compress.containers import container_module
from compress.engines.open import folder_source, gguf_source
from compress.engines.streamed import StreamedSource
from compress.errors import CalibrationError, CompressError, MissingExtra, OutputError
from compress.models.checkpoint import Checkpoint
from compress.plan.plan import Plan
from compress.recipe.schema import Export
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Check, Fallback, TaskScore
from compress.scoring.divergence import Scores, score
from compress.scoring.measure import measure
from compress.scoring.source import LogitSource
from compress.solve.tensor import decode
from compress.streaming.journal import Journal
from compress.text import calibration_windows, eval_windows, load_suite, load_tokenizer

CHECK_WINDOWS, CHECK_LENGTH = 4, 256
# The file is decoded by an independent reader and run through the same float32 forward: only rounding differs.
DECODE_TOLERANCE = 1e-5  # relative to the largest value of a tensor
# Engines compute in their own precision (llama.cpp rounds activations to 8 bits a block): median KL divergence between
# the engine's logits and those of the in-memory compressed model, nats a token. The median, because wrong metadata
# (rope, heads, norms) moves every token, while rounding now and then sends one token to another expert, far away.
ENGINE_TOLERANCE = 0.02


@dataclass
class Delivery:
    """What came of the exports."""

    artifacts: list[Artifact] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    base_scores: Scores | None = None
    base_tasks: dict[str, TaskScore] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def deliver(plan: Plan, checkpoint: Checkpoint, journal: Journal, output: Path, reporter: Reporter) -> Delivery:
    """Write and prove every artifact of the plan. See Delivery for what is returned."""
    result = Delivery()
    staging = output / ".checking"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(output / "rejected", ignore_errors=True)
    written: list[tuple[Export, list[Path]]] = []
    try:
        for export in plan.recipe.export:
            with reporter.stage(f"write {export.container}") as progress:
                written.append((export, write(plan, export, journal, staging, progress)))
        original = StreamedSource(plan.original, checkpoint.load, "original")
        memory = StreamedSource(plan.spec, lambda name: _dense(journal, name), "in-memory compressed model")
        for export, files in written:
            artifact = describe(plan, export, files, staging)
            try:
                with engine(plan, export, files, result.fallbacks) as source:
                    with reporter.stage(f"check {export.container}"):
                        result.checks += check(plan, export, files, journal, source, memory)
                    if plan.recipe.score is not None:
                        with reporter.stage(f"score {export.container}") as progress:
                            artifact = scored(plan, artifact, source, original, result, progress)
                        result.checks += limits(plan, artifact)
            except (CalibrationError, MissingExtra, OutputError):
                raise  # nothing the artifact can help
            except CompressError as error:  # the engine refuses the file, or its logits are not finite
                result.checks.append(Check(name=f"{export.container} in its engine", passed=False, detail=str(error)))
            result.artifacts.append(artifact)
        target = output if result.passed else output / "rejected"
        target.mkdir(exist_ok=True)
        for _, files in written:
            for path in _roots(files, staging):
                if not result.passed:
                    _remove(output / path.name)  # an earlier run's, with the very bytes that were just rejected
                _move(path, target / path.name)
        if not result.passed:
            result.artifacts = [
                a.model_copy(update={"path": f"rejected/{a.path}", "delivered": False}) for a in result.artifacts
            ]
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def write(plan: Plan, export: Export, journal: Journal, folder: Path, progress: Callable[[float], None]) -> list[Path]:
    """One container, from the journal's codes. Returns its files."""
    module = container_module(export.container)
    done = 0

    def fetch(name: str) -> Any:
        nonlocal done
        done += 1
        progress(done / len(plan.tensors))
        return journal.fetch(name)

    settings: dict[str, Any] = {} if export.max_shard_size is None else {"max_shard_size": export.max_shard_size}
    if export.container == "gguf":
        path, settings["name"] = folder / f"{export.name or plan.recipe.name}.gguf", plan.recipe.name
    else:
        path = folder / (export.name or f"{plan.recipe.name}-{export.container}")
    if export.container == "safetensors":
        settings["dtype"] = plan.own_codec
    options = module.Options(**settings)
    provenance = {
        "compress.version": __version__,
        "compress.model": plan.recipe.model,
        "compress.recipe": plan.recipe.name,
        "compress.recipe_digest": plan.recipe.digest(),
        "compress.calibration": _calibration_line(plan),
    }
    return module.write(
        path, plan.spec, plan.tensors, fetch, source=plan.source, provenance=provenance, options=options
    )


def _calibration_line(plan: Plan) -> str:
    c = plan.recipe.calibration
    return (
        f"{c.dataset}, {c.samples} x {c.length} tokens, seed {plan.recipe.seed}" if plan.needs_calibration else "none"
    )


def _dense(journal: Journal, name: str) -> Tensor:
    return decode(journal.fetch(name))


@contextmanager
def engine(plan: Plan, export: Export, files: Sequence[Path], fallbacks: list[Fallback]) -> Iterator[LogitSource]:
    """What runs an artifact for scoring: llama.cpp, transformers, or the file's decoded weights."""
    if export.container == "gguf":
        with gguf_source(files[0], plan.spec, fallbacks) as source:
            yield source
        return
    yield folder_source(export.container, files, plan.spec, plan.parameters, fallbacks)


def check(
    plan: Plan, export: Export, files: Sequence[Path], journal: Journal, source: LogitSource, memory: LogitSource
) -> list[Check]:
    """Every planned tensor present, finite and decoding to what was solved; logits as computed in memory."""
    label = export.container
    try:
        checks = [_check_tensors(plan, export, files, journal)]
    except CompressError as error:
        return [Check(name=f"{label} tensors", passed=False, detail=str(error))]
    windows = check_windows(plan)
    scores, _ = score(memory, source, windows)
    assert scores.kld is not None
    exact = isinstance(source, StreamedSource)  # the same arithmetic; else an engine, or values rounded to bfloat16
    what, value, limit = ("mean", scores.kld.mean, 1e-6) if exact else ("median", scores.kld.median, ENGINE_TOLERANCE)
    detail = f"{what} KL {value:.2g} between {source.name} and the in-memory model, limit {limit:g}"
    return [*checks, Check(name=f"{label} logits", passed=bool(value <= limit), detail=detail)]


def require_texts(plan: Plan) -> None:
    """Read the texts that checks and scores will want, so that a missing one stops the run before the work, not after.

    Raises CalibrationError, and CheckpointError without a tokenizer.
    """
    if plan.recipe.score is not None:
        suite = load_suite(plan.recipe.score.suite)
        eval_windows(suite.text, load_tokenizer(plan.source), windows=suite.windows, length=suite.length)
    elif not plan.needs_calibration:  # else the calibration itself reads it
        check_windows(plan)
    if any(export.container == "gguf" for export in plan.recipe.export):
        from compress.containers._gguf_tokenizer import read_vocabulary

        read_vocabulary(plan.source, plan.spec.config, plan.spec.vocab_size)


def check_windows(plan: Plan) -> np.ndarray:
    """A few windows of text for the reload check: the suite's, else calibration text; never more than the run itself
    takes of that text, so that a short one does."""
    tokenizer = load_tokenizer(plan.source)
    longest = min(CHECK_LENGTH, plan.spec.max_positions)
    if plan.recipe.score is not None:
        suite = load_suite(plan.recipe.score.suite)
        return eval_windows(
            suite.text, tokenizer, windows=min(CHECK_WINDOWS, suite.windows), length=min(longest, suite.length)
        )
    text = plan.recipe.calibration
    return calibration_windows(
        text.dataset,
        tokenizer,
        samples=min(CHECK_WINDOWS, text.samples),
        length=min(longest, text.length),
        seed=plan.recipe.seed,
    )


def _check_tensors(plan: Plan, export: Export, files: Sequence[Path], journal: Journal) -> Check:
    module = container_module(export.container)
    load = module.open_dense(files, plan.spec)
    if export.container == "gguf":
        stored = module.inventory(files[0])
        for planned in plan.tensors:
            if stored[planned.spec.gguf][0] != planned.codec:
                detail = f"{planned.name} is {stored[planned.spec.gguf][0]}, planned {planned.codec}"
                return Check(name="gguf tensors", passed=False, detail=detail)
    worst = 0.0
    for planned in plan.tensors:
        values, wanted = load(planned.name).float(), _dense(journal, planned.name)
        if values.shape != wanted.shape or not torch.isfinite(values).all():
            return Check(
                name=f"{export.container} tensors", passed=False, detail=f"{planned.name} is not finite or misshapen"
            )
        gap = float((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        limit = 2**-8 if export.container == "safetensors" else DECODE_TOLERANCE
        if not gap <= limit:
            return Check(
                name=f"{export.container} tensors",
                passed=False,
                detail=f"{planned.name} decodes {gap:.2g} (relative) off what was solved, limit {limit:.2g}",
            )
        worst = max(worst, gap)
    return Check(
        name=f"{export.container} tensors",
        passed=True,
        detail=f"{len(plan.tensors)} present, finite, decoding to what was solved; largest relative gap {worst:.2g}",
    )


def describe(plan: Plan, export: Export, files: Sequence[Path], staging: Path) -> Artifact:
    """Bytes and bits per weight of an artifact, before any score."""
    roots = _roots(files, staging)
    size = sum(
        f.stat().st_size for root in roots for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file()
    )
    weight_bytes = sum(f.stat().st_size for f in files)
    return Artifact(
        container=export.container,
        path=roots[0].name,
        bytes=size,
        bits_per_weight=round(8 * weight_bytes / plan.original_parameters, 4),
        ratio=weight_bytes / plan.source_bytes,
    )


def scored(
    plan: Plan,
    artifact: Artifact,
    source: LogitSource,
    original: LogitSource,
    result: Delivery,
    progress: Callable[[float], None],
) -> Artifact:
    """Score an artifact on the recipe's suite; the original's scores go into `result` on the way."""
    assert plan.recipe.score is not None
    measured = measure(
        source,
        original,
        load_suite(plan.recipe.score.suite),
        load_tokenizer(plan.source),
        label=Path(plan.recipe.model).name,
        max_positions=plan.spec.max_positions,
        progress=progress,
    )
    result.base_scores = result.base_scores or measured.base_scores
    result.base_tasks = result.base_tasks or measured.base_tasks
    result.fallbacks += measured.fallbacks
    return artifact.model_copy(update={"scores": measured.scores, "tasks": measured.tasks})


def limits(plan: Plan, artifact: Artifact) -> list[Check]:
    """The recipe's own limits, and that the scores are finite at all."""
    scores, gate, checks = artifact.scores, plan.recipe.gate, []
    assert scores is not None and scores.kld is not None and scores.perplexity_ratio is not None
    ratio = scores.perplexity_ratio.value
    checks.append(
        Check(
            name=f"{artifact.container} perplexity",
            passed=bool(np.isfinite(ratio)),
            detail=f"{scores.perplexity.value:.2f}, original {scores.perplexity.value / ratio:.2f}",
        )
    )
    for name, value, limit in (
        ("KL divergence", scores.kld.mean, gate.max_kld),
        ("perplexity ratio", ratio, gate.max_perplexity_ratio),
    ):
        if limit is not None:
            checks.append(
                Check(
                    name=f"{artifact.container} {name}",
                    passed=bool(value <= limit),
                    detail=f"{value:.4g}, limit {limit:g}",
                )
            )
    return checks


def _roots(files: Sequence[Path], staging: Path) -> list[Path]:
    """The entries of the staging folder that make up an artifact: its files, or the folder they lie in."""
    return sorted({staging / file.relative_to(staging).parts[0] for file in files})


def _move(path: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
