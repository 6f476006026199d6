"""`compress score`: files and folders, alone or against their original, on a suite."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from compress.engines.open import OpenedModel, remembered
from compress.engines.timing import Job, speed_prompt, time_models
from compress.errors import CompressError
from compress.export.text import source_lines, tokenizer_lines
from compress.report.checksums import require_unchanged
from compress.report.progress import Reporter
from compress.report.provenance import versions
from compress.report.scorecard import Artifact, Base, Check, Gate, Scorecard
from compress.run.targets import Target, expanded, open_original, open_target, source_of, streamed
from compress.scoring.measure import Measured, measure
from compress.scoring.original import Fresh, Original
from compress.scoring.results import Fallback
from compress.streaming.placement import Placement
from compress.text import Suite, load_suite, load_tokenizer

# Below both, a target is not its original compressed: 2-bit weights keep a cosine of .9; scaled ones most of it; rotated
# ones none, but they agree with their original on most tokens.
ALIKE_AGREEMENT, ALIKE_COSINE = 0.5, 0.2


@dataclass(frozen=True)
class Settings:
    """How targets are scored.

    strict: what speaks against the original, or for its being another model's, fails the gate; speed: engines are timed,
    too; remember: what the original predicts is kept on disk, and taken from there.
    """

    suite: str = "quick"
    device: str | None = None
    strict: bool = False
    speed: bool = False
    remember: bool = True


def score_targets(
    targets: Sequence[str], against: str | None, settings: Settings, reporter: Reporter
) -> list[Scorecard]:
    """Score every target on a suite and, when `against` names the original, say how far the two are apart: a scorecard
    each, in order. Of a run's folder all artifacts are scored.

    Every target must open before any is scored. The gate of each passes when the scores are finite and, if strict, nothing
    speaks against the original or for its being another model's. Of several targets one that cannot be scored has a
    scorecard without scores, whose gate says why; a single one raises.

    Raises CheckpointError (no such target, not one of these kinds, damaged, another vocabulary, or other bytes than the
    scorecard beside it has the checksums of), UnsupportedModel, CalibrationError (no such suite) and NumericalError
    (logits that are not finite).
    """
    placement, suite = Placement.choose(settings.device), load_suite(settings.suite)
    with reporter.stage("open"):
        original = None if against is None else open_original(against)
        opened = [open_target(target, original) for target in expanded(targets)]
        notes = [require_unchanged(found.name) for found in opened]
    cards = []
    for found, note in zip(opened, notes, strict=True):
        before = len(reporter.stages)
        try:
            card = _score_one(found, suite, settings, placement, reporter)
        except CompressError as error:
            if len(opened) == 1:
                raise
            card = _failed(found, suite, error)
        told = (*(() if note is None else (note,)), *(found.original.notes if found.original else ()), *card.notes)
        cards.append(card.model_copy(update={"notes": told, "stages": tuple(reporter.stages[before:])}))
    return _timed(cards, opened, suite, reporter) if settings.speed else cards


def _score_one(found: Target, suite: Suite, settings: Settings, placement: Placement, reporter: Reporter) -> Scorecard:
    tokenizer = load_tokenizer(found.model.folder, found.model.spec.vocab_size)
    lines = tokenizer_lines(tokenizer)
    fallbacks: list[Fallback] = []
    with reporter.stage(f"score {Path(found.name).name}") as progress, source_of(found, fallbacks, placement) as source:
        measured = measure(
            source,
            _original(found, settings, placement),
            suite,
            tokenizer,
            label=Path(found.model.name).name,
            max_positions=found.model.spec.max_positions,
            progress=progress,
        )
        lines += source_lines(tokenizer, source)
    doubts = (*measured.doubts, *_unrelated(found, measured))
    card = _scorecard(found, measured, (*lines, *fallbacks, *measured.fallbacks))
    failed = [Check(name="original", passed=False, detail=doubt) for doubt in doubts if settings.strict]
    checks = (*card.gate.checks, *failed)
    gate = Gate(passed=all(check.passed for check in checks), checks=checks)
    return card.model_copy(update={"notes": tuple(doubts), "gate": gate, "suite": suite.name})


def _original(found: Target, settings: Settings, placement: Placement) -> Original | None:
    """What the original predicts and answers."""
    original = found.original
    if original is None:
        return None
    source = streamed(original, "original", placement)
    return remembered(source, original.files, original.folder) if settings.remember else Fresh(source)


def _timed(cards: Sequence[Scorecard], opened: Sequence[Target], suite: Suite, reporter: Reporter) -> list[Scorecard]:
    """The scorecards with the throughput of every target, and of the original beside them, all in turns."""
    model, original = opened[0].model, opened[0].original
    jobs = {found.name: Job.of(found.container, found.files, found.model.parameters) for found in opened}
    before = None if original is None else Job.of_original(original.files, original.parameters)
    prompt = speed_prompt(suite, load_tokenizer(model.folder, model.spec.vocab_size), model.spec.max_positions)
    with reporter.stage("speed") as progress:
        timed = time_models(jobs, before, prompt, progress=lambda done, total: progress(done / total))
    told = []
    for card, found in zip(cards, opened, strict=True):
        (artifact,) = card.artifacts
        update = {
            "artifacts": (artifact.model_copy(update={"speed": timed.speeds.get(found.name)}),),
            "base": card.base.model_copy(update={"speed": timed.original}),
            "fallbacks": (*card.fallbacks, *timed.lines(found.name)),
            "stages": (*card.stages, reporter.stages[-1]),
        }
        told.append(card.model_copy(update=update))
    return told


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


def _failed(found: Target, suite: Suite, error: CompressError) -> Scorecard:
    """Of a target that cannot be scored."""
    gate = Gate(passed=False, checks=(Check(name="scores", passed=False, detail=str(error)),))
    return _described(found).model_copy(update={"gate": gate, "suite": suite.name})


def _described(found: Target) -> Scorecard:
    """What a target is, before anything is measured."""
    original = found.original
    base = Base(bytes=None)
    if original is not None:
        parameters, weights = original.parameters, original.weight_bytes
        base = Base(
            bytes=original.bytes,
            weight_bytes=weights,
            bits_per_weight=8 * weights / parameters,
            parameters=parameters,
        )
    artifact = Artifact(
        container=found.container.name,
        path=found.name,
        bytes=found.bytes,
        bits_per_weight=round(8 * found.weight_bytes / found.model.parameters, 4),
        ratio=None if original is None else found.bytes / original.bytes,
    )
    return Scorecard(
        model=found.model.name,
        recipe=Path(found.name).name,
        artifacts=(artifact,),
        base=base,
        gate=Gate(passed=True),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def _scorecard(found: Target, measured: Measured, fallbacks: tuple[Fallback, ...]) -> Scorecard:
    card, perplexity = _described(found), measured.scores.perplexity.value
    finite = Check(name="perplexity", passed=isfinite(perplexity), detail=f"{perplexity:.4g}")
    (artifact,) = card.artifacts
    before = {"scores": measured.base_scores, "tasks": measured.base_tasks, "texts": measured.base_texts}
    after = {"scores": measured.scores, "tasks": measured.tasks, "texts": measured.texts}
    update = {
        "artifacts": (artifact.model_copy(update=after),),
        "base": card.base.model_copy(update=before),
        "fallbacks": fallbacks,
        "gate": Gate(passed=finite.passed, checks=(finite,)),
    }
    return card.model_copy(update=update)
