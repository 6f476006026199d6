"""From finished codes to delivered artifacts: write, read back, score, pass the gate, rename.

Nothing gets its final name before every check has passed; what fails lies in `rejected/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import __version__
from compress.checkpoint import Checkpoint
from compress.codecs import get_codec
from compress.errors import CompressError
from compress.journal import Journal
from compress.plan import Plan
from compress.recipe import Export
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Check, Fallback, TaskScore
from compress.scoring.divergence import Scores, score, score_many
from compress.scoring.sources import LogitSource
from compress.scoring.streamed import StreamedSource
from compress.text import calibration_windows, eval_windows, load_suite, load_tokenizer

CHECK_WINDOWS = 4
# The file is decoded by an independent reader and run through the same float32 forward: only rounding differs.
DECODE_TOLERANCE = 1e-5  # relative to the largest value of a tensor
# Engines compute in their own precision (llama.cpp rounds activations to 8 bits a block): mean KL divergence between
# the engine's logits and those of the in-memory compressed model, nats a token.
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
        original = StreamedSource(plan.spec, checkpoint.load, "original")
        memory = StreamedSource(plan.spec, lambda name: _dense(journal, name), "in-memory compressed model")
        for export, files in written:
            with ExitStack() as stack:
                source = stack.enter_context(engine(plan, export, files, result.fallbacks))
                with reporter.stage(f"check {export.container}"):
                    result.checks += check(plan, export, files, journal, source, memory)
                artifact = describe(plan, export, files, staging)
                if plan.recipe.score is not None:
                    with reporter.stage(f"score {export.container}") as progress:
                        artifact = measure(plan, artifact, source, original, result, progress, reporter)
                    result.checks += limits(plan, artifact)
                result.artifacts.append(artifact)
        target = output if result.passed else output / "rejected"
        target.mkdir(exist_ok=True)
        for _, files in written:
            for path in _roots(files, staging):
                _move(path, target / path.name)
        if not result.passed:
            result.artifacts = [a.model_copy(update={"path": f"rejected/{a.path}", "delivered": False}) for a in result.artifacts]
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def write(plan: Plan, export: Export, journal: Journal, folder: Path, progress: Callable[[float], None]) -> list[Path]:
    """One container, from the journal's codes. Returns its files."""
    module = import_module(f"compress.containers.{export.container}")
    done = 0

    def fetch(name: str) -> Any:
        nonlocal done
        done += 1
        progress(done / len(plan.tensors))
        return journal.fetch(name)

    options: dict[str, Any] = {} if export.max_shard_size is None else {"max_shard_size": export.max_shard_size}
    if export.container == "gguf":
        path, options["name"] = folder / f"{export.name or plan.recipe.name}.gguf", plan.recipe.name
        options = {"options": module.GgufOptions(**options)}
    else:
        path = folder / (export.name or f"{plan.recipe.name}-{export.container}")
        kind = {"gptq": "GptqOptions", "safetensors": "SafetensorsOptions"}[export.container]
        options = {"options": getattr(module, kind)(**options)}
    provenance = {"compress.version": __version__, "compress.recipe": plan.recipe.name,
                  "compress.recipe_digest": plan.recipe.digest(), "compress.calibration": _calibration_line(plan)}
    return module.write(path, plan.spec, plan.tensors, fetch, source=plan.source, provenance=provenance, **options)


def _calibration_line(plan: Plan) -> str:
    c = plan.recipe.calibration
    return f"{c.dataset}, {c.samples} x {c.length} tokens, seed {plan.recipe.seed}" if plan.needs_calibration else "none"


def _dense(journal: Journal, name: str) -> Tensor:
    packed = journal.fetch(name)
    return get_codec(packed.codec).unpack(packed)


@contextmanager
def engine(plan: Plan, export: Export, files: Sequence[Path], fallbacks: list[Fallback]) -> Iterator[LogitSource]:
    """What runs an artifact for scoring: llama.cpp, transformers, or the file's decoded weights."""
    if export.container == "gguf" and find_spec("llama_cpp") is not None:
        from compress.scoring.llama_cpp import LlamaCpp

        with LlamaCpp(files[0]) as source:
            yield source
        return
    if export.container == "safetensors":
        from compress.scoring.sources import TransformersSource

        yield TransformersSource(files[0].parent)
        return
    if export.container == "gguf":
        fallbacks.append(Fallback(subject=files[0].name, wanted="scored by llama.cpp", used="scored by its decoded weights",
                                  reason="llama-cpp-python is not installed: pip install 'compress-llm[llama]'"))
    module = import_module(f"compress.containers.{export.container}")
    yield StreamedSource(plan.spec, module.open_dense(files, plan.spec), "decoded weights")


def check(plan: Plan, export: Export, files: Sequence[Path], journal: Journal, source: LogitSource,
          memory: LogitSource) -> list[Check]:
    """Every planned tensor present, finite and decoding to what was solved; logits as computed in memory."""
    label = export.container
    try:
        checks = [_check_tensors(plan, export, files, journal)]
    except CompressError as error:
        return [Check(name=f"{label} tensors", passed=False, detail=str(error))]
    windows = check_windows(plan)
    scores, _ = score(memory, source, windows)
    assert scores.kld is not None
    exact = isinstance(source, StreamedSource)
    tolerance = 1e-6 if exact else ENGINE_TOLERANCE
    if export.container == "safetensors":  # stored in bfloat16: the values themselves were rounded
        tolerance = ENGINE_TOLERANCE
    passed = scores.kld.mean <= tolerance
    detail = f"mean KL {scores.kld.mean:.2g} between {source.name} and the in-memory model, limit {tolerance:g}"
    return [*checks, Check(name=f"{label} logits", passed=passed, detail=detail)]


def check_windows(plan: Plan) -> np.ndarray:
    """A few windows of text for the reload check: the suite's, else calibration text."""
    tokenizer = load_tokenizer(plan.source)
    length = min(256, plan.spec.max_positions)
    if plan.recipe.score is not None:
        return eval_windows(load_suite(plan.recipe.score.suite).text, tokenizer, windows=CHECK_WINDOWS, length=length)
    return calibration_windows(plan.recipe.calibration.dataset, tokenizer, samples=CHECK_WINDOWS, length=length,
                               seed=plan.recipe.seed)


def _check_tensors(plan: Plan, export: Export, files: Sequence[Path], journal: Journal) -> Check:
    module = import_module(f"compress.containers.{export.container}")
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
            return Check(name=f"{export.container} tensors", passed=False, detail=f"{planned.name} is not finite or misshapen")
        gap = float((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        limit = 2**-8 if export.container == "safetensors" else DECODE_TOLERANCE
        if gap > limit:
            return Check(name=f"{export.container} tensors", passed=False,
                         detail=f"{planned.name} decodes {gap:.2g} (relative) off what was solved, limit {limit:.2g}")
        worst = max(worst, gap)
    return Check(name=f"{export.container} tensors", passed=True,
                 detail=f"{len(plan.tensors)} present, finite, of their planned type; largest relative gap {worst:.2g}")


def describe(plan: Plan, export: Export, files: Sequence[Path], staging: Path) -> Artifact:
    """Bytes and bits per weight of an artifact, before any score."""
    roots = _roots(files, staging)
    size = sum(f.stat().st_size for root in roots for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())
    weight_bytes = sum(f.stat().st_size for f in files)
    return Artifact(container=export.container, path=roots[0].name, bytes=size,
                    bits_per_weight=round(8 * weight_bytes / plan.parameters, 4), ratio=weight_bytes / plan.source_bytes)


def measure(plan: Plan, artifact: Artifact, source: LogitSource, original: LogitSource, result: Delivery,
            progress: Any, reporter: Reporter) -> Artifact:
    """Score an artifact on the recipe's suite; the original's scores go into `result` on the way."""
    assert plan.recipe.score is not None
    suite = load_suite(plan.recipe.score.suite)
    tokenizer = load_tokenizer(plan.source)
    windows = eval_windows(suite.text, tokenizer, windows=suite.windows, length=suite.length)
    scores, _ = score_many(original, [source], windows, tokenizer=plan.source.name,
                           progress=lambda n, total: progress(0.6 * n / total))[0]
    result.base_scores = result.base_scores or replace(scores.of_reference(), engine=original.name)
    tasks: dict[str, TaskScore] = {}
    if suite.tasks and find_spec("lm_eval") is None:
        result.fallbacks.append(Fallback(subject="tasks", wanted=", ".join(suite.tasks), used="not scored",
                                         reason="lm-eval is not installed: pip install 'compress-llm[eval]'"))
    elif suite.tasks:
        from compress.scoring.tasks import compare, summarise, task_outcomes

        before = task_outcomes(original, tokenizer, suite.tasks, max_length=plan.spec.max_positions,
                               progress=lambda n, total: progress(0.6 + 0.2 * n / total))
        after = task_outcomes(source, tokenizer, suite.tasks, max_length=plan.spec.max_positions,
                              progress=lambda n, total: progress(0.8 + 0.2 * n / total))
        if not result.base_tasks:
            result.base_tasks = {k: TaskScore(**v) for k, v in summarise(before).items()}
        tasks = {k: TaskScore(**v, difference=compare(after[k], before[k]) if k in after else None)
                 for k, v in summarise(after).items()}
    return artifact.model_copy(update={"scores": scores, "tasks": tasks})


def limits(plan: Plan, artifact: Artifact) -> list[Check]:
    """The recipe's own limits, and that the scores are finite at all."""
    scores, gate, checks = artifact.scores, plan.recipe.gate, []
    assert scores is not None and scores.kld is not None and scores.perplexity_ratio is not None
    ratio = scores.perplexity_ratio.value
    checks.append(Check(name=f"{artifact.container} perplexity", passed=bool(np.isfinite(ratio)),
                        detail=f"{scores.perplexity.value:.2f}, original {scores.perplexity.value / ratio:.2f}"))
    for name, value, limit in (("KL divergence", scores.kld.mean, gate.max_kld),
                               ("perplexity ratio", ratio, gate.max_perplexity_ratio)):
        if limit is not None:
            checks.append(Check(name=f"{artifact.container} {name}", passed=bool(value <= limit),
                                detail=f"{value:.4g}, limit {limit:g}"))
    return checks


def _roots(files: Sequence[Path], staging: Path) -> list[Path]:
    """The entries of the staging folder that make up an artifact: its files, or the folder they lie in."""
    return sorted({staging / file.relative_to(staging).parts[0] for file in files})


def _move(path: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)
