"""An artifact against what was solved: every tensor read back, its logits beside those of the in-memory model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress.containers import CONTAINERS, Container
from compress.decode import decode
from compress.engines.streamed import StreamedSource
from compress.errors import CompressError
from compress.export.text import plan_tokenizer, reads_no_text, tokenizer_checks
from compress.plan.plan import Plan
from compress.recipe.schema import Export
from compress.report.scorecard import Check
from compress.scoring.divergence import score
from compress.scoring.source import LogitSource
from compress.text import calibration_windows, eval_windows, load_suite
from compress.weights import Packed

CHECK_WINDOWS, CHECK_LENGTH = 4, 256
TENSORS_SHARE = 0.5  # of the progress bar; the rest goes to logits
# Engines compute in their own precision (llama.cpp rounds activations to 8 bits a block): median KL divergence between
# the engine's logits and those of the in-memory compressed model, nats a token. The median, because wrong metadata
# (rope, heads, norms) moves every token, while rounding now and then sends one token to another expert, far away.
ENGINE_TOLERANCE = 0.02
# The file is decoded by an independent reader and run through the same float32 forward: only rounding differs.
SAME_ARITHMETIC_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Compared:
    """What runs an artifact, and the in-memory model that it should be."""

    source: LogitSource
    memory: LogitSource


def check(
    plan: Plan,
    export: Export,
    files: Sequence[Path],
    packed: Callable[[str], Packed],
    compared: Compared,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Check]:
    """Every planned tensor present, finite and decoding to what was solved; logits as computed in memory. packed: what was
    solved, by name."""
    container, source = CONTAINERS[export.container], compared.source
    try:
        checks = [_check_tensors(plan, container, files, packed, lambda done: progress(TENSORS_SHARE * done))]
    except CompressError as error:
        return [_tensors(container, False, str(error))]
    windows = check_windows(plan)
    rest = 1 - TENSORS_SHARE
    scores, _ = score(
        compared.memory, source, windows, progress=lambda done, total: progress(TENSORS_SHARE + rest * done / total)
    )
    assert scores.kld is not None
    # the same arithmetic on the same values; else an engine, or values that a dense container has rounded
    exact = isinstance(source, StreamedSource) and not container.dense
    what, value, limit = ("median", scores.kld.median, ENGINE_TOLERANCE)
    if exact:
        what, value, limit = ("mean", scores.kld.mean, SAME_ARITHMETIC_TOLERANCE)
    detail = f"{what} KL {value:.2g} between {source.name} and the in-memory model, limit {limit:g}"
    checks.append(Check(name=f"{container.name} logits", passed=bool(value <= limit), detail=detail))
    return [*checks, *tokenizer_checks(plan, container, files, source)]


def _tensors(container: Container, passed: bool, detail: str) -> Check:
    return Check(name=f"{container.name} tensors", passed=passed, detail=detail)


def _check_tensors(
    plan: Plan,
    container: Container,
    files: Sequence[Path],
    packed: Callable[[str], Packed],
    progress: Callable[[float], None],
) -> Check:
    load = container.open_dense(files, plan.spec)
    stored: Mapping[str, str] = {} if container.inventory is None else container.inventory(files, plan.spec)
    tensors = [t for t in plan.tensors if container.has_place(t.spec)]
    for planned in tensors:
        if (codec := stored.get(planned.name, planned.codec)) != planned.codec:
            return _tensors(container, False, f"{planned.name} is {codec}, planned {planned.codec}")
    worst = 0.0
    for number, planned in enumerate(tensors, start=1):
        values, wanted = load(planned.name).float(), decode(packed(planned.name))
        if values.shape != wanted.shape or not torch.isfinite(values).all():
            return _tensors(container, False, f"{planned.name} is not finite or misshapen")
        gap = float((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not gap <= container.tolerance:
            return _tensors(
                container,
                False,
                f"{planned.name} decodes {gap:.2g} (relative) off what was solved, limit {container.tolerance:.2g}",
            )
        worst = max(worst, gap)
        progress(number / len(tensors))
    return _tensors(
        container,
        True,
        f"{len(tensors)} present, finite, decoding to what was solved; largest relative gap {worst:.2g}",
    )


def check_windows(plan: Plan) -> np.ndarray:
    """A few windows of text for the reload check: the suite's, else calibration text; never more than the run itself
    takes of that text, so that a short one does. Random ids where neither the run nor the model reads text."""
    longest = min(CHECK_LENGTH, plan.spec.max_positions)
    if reads_no_text(plan):
        size = (CHECK_WINDOWS, longest)
        return np.random.default_rng(plan.recipe.seed).integers(0, plan.spec.vocab_size, size, dtype=np.int32)
    tokenizer = plan_tokenizer(plan)
    if plan.recipe.score is not None:
        text = next(iter(load_suite(plan.recipe.score.suite).texts.values()))
        return eval_windows(
            text.text,
            tokenizer,
            windows=min(CHECK_WINDOWS, text.windows or CHECK_WINDOWS),
            length=min(longest, text.protocol.length),
        ).tokens
    calibration = plan.recipe.calibration
    return calibration_windows(
        calibration.source,
        tokenizer,
        samples=min(CHECK_WINDOWS, calibration.samples),
        length=min(longest, calibration.length),
        seed=plan.recipe.seed,
    )
