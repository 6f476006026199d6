"""What runs an artifact, and `compress score`: any GGUF file or Hugging Face folder, alone or against its original."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from compress import __version__
from compress.engines.open import OpenedModel, folder_source, gguf_files, gguf_source, is_gguf, open_model
from compress.engines.streamed import StreamedSource
from compress.errors import CheckpointError
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Base, Check, Fallback, Gate, Scorecard
from compress.scoring.measure import measure
from compress.scoring.source import LogitSource
from compress.text import load_suite, load_tokenizer

if TYPE_CHECKING:
    pass


def score_target(target: str, against: str | None, suite: str, reporter: Reporter) -> Scorecard:
    """Score `target` on a suite and, when `against` names the original, say how far the two are apart.

    target: a GGUF file (or the first of a split set), a folder of any container, a hub id or a bundled model. against: a
    dense folder, hub id or bundled model; a GGUF needs it for its tokenizer. Without it, perplexity and task accuracy
    only. The gate passes when the scores are finite.

    Raises CheckpointError (no such target, not one of these kinds, damaged, another vocabulary), UnsupportedModel,
    CalibrationError (no such suite) and NumericalError (logits that are not finite).
    """
    chosen = load_suite(suite)
    with reporter.stage("open"):
        gguf = is_gguf(target)
        if gguf and against is None:
            raise CheckpointError(
                f"scoring {target} needs the original's tokenizer; add --against ORIGINAL (its folder or hub id)"
            )
        original = None if against is None else open_model(against)
        if original is not None and original.container != "safetensors":
            raise CheckpointError(f"{against} is itself quantized; give the original to --against")
        opened = None if gguf else open_model(target)
        model = original or opened
        assert model is not None
        tokenizer = load_tokenizer(model.folder)
        files = gguf_files(Path(target)) if opened is None else opened.files
    fallbacks: list[Fallback] = []
    with _source(target, opened, model, fallbacks) as source, reporter.stage("score") as progress:
        reference = None if original is None else StreamedSource(original.spec, original.load, "original")
        measured = measure(
            source,
            reference,
            chosen,
            tokenizer,
            label=Path(model.name).name,
            max_positions=model.spec.max_positions,
            progress=progress,
        )
    weight_bytes = sum(file.stat().st_size for file in files)
    size = weight_bytes if opened is None else sum(f.stat().st_size for f in opened.folder.rglob("*") if f.is_file())
    perplexity = measured.scores.perplexity.value
    finite = Check(name="perplexity", passed=isfinite(perplexity), detail=f"{perplexity:.4g}")
    base = Base(bytes=None)
    if original is not None:
        base = Base(
            bytes=original.bytes,
            bits_per_weight=8 * original.bytes / original.parameters,
            parameters=original.parameters,
            scores=measured.base_scores,
            tasks=measured.base_tasks,
        )
    artifact = Artifact(
        container="gguf" if opened is None else opened.container,
        path=target,
        bytes=size,
        bits_per_weight=round(8 * weight_bytes / model.parameters, 4),
        ratio=None if original is None else weight_bytes / original.bytes,
        scores=measured.scores,
        tasks=measured.tasks,
    )
    return Scorecard(
        model=model.name,
        recipe=Path(target).name,
        artifacts=(artifact,),
        base=base,
        fallbacks=(*fallbacks, *measured.fallbacks),
        gate=Gate(passed=finite.passed, checks=(finite,)),
        stages=tuple(reporter.stages),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"compress": __version__},
    )


@contextmanager
def _source(
    target: str, opened: OpenedModel | None, model: OpenedModel, fallbacks: list[Fallback]
) -> Iterator[LogitSource]:
    """What runs the target."""
    if opened is None:
        with gguf_source(Path(target), model.spec, fallbacks) as source:
            yield source
    elif opened.container == "safetensors":
        yield StreamedSource(opened.spec, opened.load, "streamed weights")
    else:
        yield folder_source(opened.container, opened.files, opened.spec, opened.parameters, fallbacks)
