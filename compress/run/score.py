"""What runs an artifact, and `compress score`: any GGUF file or Hugging Face folder, alone or against its original."""

from __future__ import annotations

import datetime
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from compress import __version__
from compress.containers import Container
from compress.engines.open import OpenedModel, artifact_source, file_container, file_set, open_model
from compress.engines.streamed import StreamedSource
from compress.errors import CheckpointError, CompressError
from compress.export.text import source_lines, tokenizer_lines
from compress.report.checksums import require_unchanged
from compress.report.progress import Reporter
from compress.report.scorecard import Artifact, Base, Check, Gate, Scorecard
from compress.scoring.measure import Measured, measure
from compress.scoring.results import Fallback
from compress.scoring.source import LogitSource
from compress.streaming.placement import Placement
from compress.text import load_suite, load_tokenizer

# Below both, a target is not its original compressed: 2-bit weights keep a cosine of .9; scaled ones most of it; rotated
# ones none, but they agree with their original on most tokens.
ALIKE_AGREEMENT, ALIKE_COSINE = 0.5, 0.2


@dataclass(frozen=True)
class Target:
    """What is scored. opened: None for a single file, which is run as a model like `model`, the original."""

    name: str
    container: Container
    files: tuple[Path, ...]
    opened: OpenedModel | None
    model: OpenedModel
    original: OpenedModel | None

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def bytes(self) -> int:
        """With all that lies beside the weights in a folder."""
        if self.opened is None:
            return self.weight_bytes
        return sum(f.stat().st_size for f in self.opened.folder.rglob("*") if f.is_file())


def score(target: str, against: str | None = None, *, suite: str = "quick", device: str | None = None) -> Scorecard:
    """Perplexity, KL divergence and task accuracy of a GGUF file or folder, against its original where that is named.

    Arguments and errors as of `score_target`; device as of `compress.run`.
    """
    return score_target(target, against, suite, Reporter(0), device)


def score_target(
    target: str,
    against: str | None,
    suite: str,
    reporter: Reporter,
    device: str | None = None,
    *,
    strict: bool = False,
) -> Scorecard:
    """Score `target` on a suite and, when `against` names the original, say how far the two are apart.

    target: a GGUF file (or the first of a split set), a folder of any container, a hub id or a bundled model.
    against: a dense folder, hub id or bundled model; a GGUF needs it for its tokenizer. Without it, perplexity and task
    accuracy only. The gate passes when the scores are finite and, if strict, nothing speaks against the
    original or for its being another model's.

    Raises CheckpointError (no such target, not one of these kinds, damaged, another vocabulary, or other bytes than the
    scorecard beside it has the checksums of), UnsupportedModel,
    CalibrationError (no such suite) and NumericalError (logits that are not finite).
    """
    placement = Placement.choose(device)
    chosen = load_suite(suite)
    with reporter.stage("open"):
        found = _open(target, against)
        note = require_unchanged(target)
        tokenizer = load_tokenizer(found.model.folder, found.model.spec.vocab_size)
        lines = tokenizer_lines(tokenizer)
        if found.opened is None:
            file_set(found.container, Path(target))
    fallbacks: list[Fallback] = []
    with _source(found, fallbacks, placement) as source, reporter.stage("score") as progress:
        original = found.original
        reference = None if original is None else StreamedSource(original.spec, original.load, "original", placement)
        measured = measure(
            source,
            reference,
            chosen,
            tokenizer,
            label=Path(found.model.name).name,
            max_positions=found.model.spec.max_positions,
            progress=progress,
        )
        lines += source_lines(tokenizer, source)
    doubts = (*measured.doubts, *_unrelated(found, measured))
    card = _scorecard(found, measured, (*lines, *fallbacks, *measured.fallbacks), reporter)
    checks = (*card.gate.checks, *(Check(name="original", passed=False, detail=doubt) for doubt in doubts if strict))
    gate = Gate(passed=all(check.passed for check in checks), checks=checks)
    notes = doubts if note is None else (note, *doubts)
    return card.model_copy(update={"notes": notes, "gate": gate, "suite": chosen.name})


def _open(target: str, against: str | None) -> Target:
    """The target and its original. Raises CheckpointError where one is missing or not what it should be."""
    container = file_container(target)
    if container is not None and against is None:
        raise CheckpointError(
            f"scoring {target} needs the original's tokenizer; add --against ORIGINAL (its folder or hub id)"
        )
    original = None if against is None else open_model(against)
    if original is not None and not original.container.original:
        raise CheckpointError(f"{against} is itself quantized; give the original to --against")
    if container is None:
        opened = open_model(target)
        return Target(target, opened.container, opened.files, opened, original or opened, original)
    assert original is not None
    return Target(target, container, tuple(container.files(Path(target))), None, original, original)


def _unrelated(found: Target, measured: Measured) -> list[str]:
    """A line where the target does not look like its original compressed: neither its predictions nor its weights are alike."""
    original, agreement = found.original, measured.scores.top1_agreement
    if original is None or agreement is None or agreement.value >= ALIKE_AGREEMENT:
        return []
    if (cosine := _cosine(found, original)) is not None and cosine >= ALIKE_COSINE:
        return []
    return [
        f"{found.name} and {original.name} have little in common: they agree on {agreement.value:.0%} of next tokens; "
        "is that the original it was made from?"
    ]


def _cosine(found: Target, original: OpenedModel) -> float | None:
    """Between the largest matrix of the first block in both; None where the target has no such matrix."""
    name = max(original.spec.block_tensors(0), key=lambda tensor: tensor.parameters).name
    try:
        opened = found.opened
        load = opened.load if opened is not None else found.container.open_dense(found.files, original.spec)
        one, other = load(name).float().flatten(), original.load(name).float().flatten()
    except CompressError:  # of another shape
        return None
    return float(one @ other / (one.norm() * other.norm()).clamp_min(1e-30)) if one.shape == other.shape else None


def _scorecard(found: Target, measured: Measured, fallbacks: tuple[Fallback, ...], reporter: Reporter) -> Scorecard:
    original = found.original
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
        container=found.container.name,
        path=found.name,
        bytes=found.bytes,
        bits_per_weight=round(8 * found.weight_bytes / found.model.parameters, 4),
        ratio=None if original is None else found.bytes / original.bytes,
        scores=measured.scores,
        tasks=measured.tasks,
    )
    return Scorecard(
        model=found.model.name,
        recipe=Path(found.name).name,
        artifacts=(artifact,),
        base=base,
        fallbacks=fallbacks,
        gate=Gate(passed=finite.passed, checks=(finite,)),
        stages=tuple(reporter.stages),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"compress": __version__},
    )


def _source(found: Target, fallbacks: list[Fallback], placement: Placement) -> AbstractContextManager[LogitSource]:
    """What runs the target."""
    opened = found.opened
    if opened is None:
        return artifact_source(found.container, [Path(found.name)], found.model.spec, found.model.parameters, fallbacks)
    if opened.container.original:
        return nullcontext(StreamedSource(opened.spec, opened.load, "streamed weights", placement))
    return artifact_source(opened.container, opened.files, opened.spec, opened.parameters, fallbacks)
