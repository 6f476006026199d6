"""The loop: plan, then block by block collect, solve, forward, journal; then containers, gate, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError, GateFailed
from compress.export.deliver import Delivery, Product, deliver, require_texts
from compress.files import checksum, locked
from compress.machine import look
from compress.machine.measured import Measured
from compress.models.checkpoint import Checkpoint
from compress.plan.causes import count_of
from compress.plan.duration import runs_like, work
from compress.plan.make import make_plan
from compress.plan.plan import Plan
from compress.plan.texts import read_texts
from compress.recipe.ladder import Ladder
from compress.recipe.schema import Recipe
from compress.report import provenance
from compress.report import scorecard as scorecards
from compress.report.progress import Reporter
from compress.report.scorecard import Scorecard
from compress.run.claim import WORK, Undertaking, claim, finished, open_journal, run_digest
from compress.run.inspect import INSPECTED, inspect
from compress.run.ladder import Rung, compress_ladder, ladder_scorecard, leading, write_imatrix
from compress.run.records import jsonl, tensor_records
from compress.run.recover import RECOVERED, tunes_end_to_end
from compress.run.source import open_original
from compress.run.summary import make_scorecard
from compress.run.told import Expected, prepare, put, started, told_files
from compress.run.units import compress_model, load_calibration, read_calibration, with_beside
from compress.streaming.journal import LOCK, Journal, discard
from compress.streaming.placement import Placement
from compress.weights import Packed


@dataclass(frozen=True)
class Manner:
    """How a run goes about it. reporter: hears of stages; device: as `Placement.choose` reads it; strict: what speaks against
    the original is an error; fresh: whatever the folder holds is made anew; keep_work: the work folder stays; expected: of the
    run that it repeats."""

    reporter: Reporter
    device: str | None = None
    strict: bool = False
    fresh: bool = False
    keep_work: bool = False
    expected: Expected | None = None


def run(
    recipe: Recipe,
    *,
    fresh: bool = False,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    device: str | None = None,
    strict: bool = False,
    expected: Expected | None = None,
) -> Scorecard:
    """Carry out a recipe and return its scorecard; artifacts lie in `recipe.output`.

    device: auto, cpu, cuda, cuda:N or mps; by default what COMPRESS_DEVICE says, else the CPU. strict: what speaks against
    the original itself is an error instead of a note. expected: of the run that it repeats.

    A run that was killed continues where it stopped; one that is finished, and whose artifacts are unchanged, is not done
    again. A second run into `recipe.output` meanwhile raises OutputError. Raises GateFailed (exit code 3) after writing the
    scorecard when an artifact is not fit to deliver, and the other CompressErrors before anything has its final name.
    """
    manner = Manner(reporter or Reporter(0), device, strict, fresh, keep_work, expected)
    return _conduct(Ladder(recipe.name, recipe.output, {None: recipe}), manner)


def run_ladder(
    ladder: Ladder,
    *,
    fresh: bool = False,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    device: str | None = None,
    strict: bool = False,
    expected: Expected | None = None,
) -> Scorecard:
    """Compress a model to several types in one pass over its blocks and the calibration text; all artifacts, one scorecard and
    the importance matrix lie in `ladder.output`. Arguments, resume and errors as of `run`."""
    return _conduct(ladder, Manner(reporter or Reporter(0), device, strict, fresh, keep_work, expected))


def _conduct(ladder: Ladder, manner: Manner) -> Scorecard:
    """Claim the output folder, do what is not done yet, leave nothing else behind."""
    reporter, output = manner.reporter, Path(ladder.output)
    placement = Placement.choose(manner.device)
    with ExitStack() as held:
        with reporter.stage("plan"):
            early = _plans(ladder, manner.expected)
            claim(output, early.undertaking, fresh=manner.fresh)
            if not early.lead.stamp:  # before weights are downloaded: all that config.json, tokenizer and texts tell
                read_texts(early.lead)
            held.enter_context(locked(output / WORK / LOCK, output))
            plans = _plans(ladder, manner.expected, weights=True)
            claim(output, plans.undertaking, fresh=manner.fresh)
            card = None if manner.fresh else _finished(plans, output)
            journal = open_journal(output, plans.undertaking, fresh=manner.fresh) if card is None else None
            if journal is not None:
                reporter.continue_times(journal.folder, journal.digest)
        if journal is None:
            reporter.say(f"already done: {output} holds what this recipe makes, unchanged; --fresh makes it anew")
        else:
            card = _carry_out(plans, journal, output, manner, placement)
        if not manner.keep_work:
            discard(output / WORK)
    assert card is not None
    return card


@dataclass(frozen=True)
class _Plans:
    """What is carried out together: one plan, or a ladder's by their types. undertaking: what it is to its folder."""

    by_variant: Mapping[str | None, Plan]
    undertaking: Undertaking

    @property
    def lead(self) -> Plan:
        """The one that says what is read; the original, and how all are scored, is the same."""
        return leading(list(self.by_variant.values()))

    def saying(self, chosen: tuple[str, ...]) -> _Plans:
        """The same with more lines that say what was chosen."""
        return _Plans({name: plan.saying(chosen) for name, plan in self.by_variant.items()}, self.undertaking)


def _plans(ladder: Ladder, expected: Expected | None, *, weights: bool = False) -> _Plans:
    plans = {name: make_plan(recipe, weights=weights) for name, recipe in ladder.recipes.items()}
    if expected is not None:
        plans = {name: expected.plan(plan, name) for name, plan in plans.items()}
    if None in plans:
        return _Plans(plans, Undertaking.of(plans[None]))
    return _Plans(plans, Undertaking.of_ladder(ladder.name, {str(name): plan for name, plan in plans.items()}))


def _carry_out(plans: _Plans, journal: Journal, output: Path, manner: Manner, placement: Placement) -> Scorecard:
    """All of a run once there is something to do: solve, deliver, tell. Raises GateFailed when that is told."""
    placement = placement.multiplying(plans.lead.recipe.precision, plans.lead.own_codec)
    reporter, lead, planned, whole = manner.reporter, plans.lead, plans.lead, not journal.units
    _announce(plans, journal, reporter)
    try:
        checkpoint = open_original(lead)
        if manner.expected is not None:
            with reporter.stage("compare original"):
                other = manner.expected.require_original(checkpoint)
            for line in other:
                reporter.say(f"note: {line}")
        result = Delivery(strict=manner.strict)
        with reporter.stage("tokenizer"):
            # how a model's text is read depends on who reads it: once for the types of one container
            readers = {plan.recipe.containers: plan for plan in plans.by_variant.values()}
            for plan in readers.values():
                result.fallbacks += [line for line in require_texts(plan, reporter) if line not in result.fallbacks]
        ids = None
        if lead.needs_calibration:  # before the weights: what is wrong with it is known in seconds
            with reporter.stage("calibration text") as progress:
                text = read_calibration(lead, progress)
            for line in text.lines:
                reporter.say(f"note: calibration text: {line}")
            if manner.expected is not None:
                manner.expected.require_text(text.ids.tobytes())
            ids, plans = text.ids, plans.saying(tuple(f"calibration text: {line}" for line in text.lines))
        inspect(lead, checkpoint, journal, reporter, manner.strict)
        rungs = [Rung(str(name), plan, journal) for name, plan in plans.by_variant.items() if name is not None]
        with torch.inference_mode():
            if rungs:
                compress_ladder(rungs, checkpoint, journal, reporter, placement, ids)
                products = [_product(rung.plan, checkpoint, rung.fetch, rung.name) for rung in rungs]
            else:
                solved = compress_model(plans.lead, checkpoint, journal, reporter, placement, ids)
                products = [_product(solved, checkpoint, journal.fetch)]
            results = deliver(products, checkpoint, output, reporter, placement, result)
    except CompressError:
        if not set(journal.units) - {INSPECTED}:  # nothing to go on from: the next run may be another recipe's
            discard(journal.folder)
        raise
    machine, start = provenance.machine(str(placement.device), placement.products), None
    if results.passed:
        with reporter.stage("checksums"):
            start = started(lead, plans.undertaking, journal, checkpoint)
    if rungs:
        beside = write_imatrix(rungs, output) if results.passed else {}
        card = ladder_scorecard(plans.undertaking, rungs, results, reporter, machine, beside)
        records: Iterable[dict[str, Any]] = chain.from_iterable(rung.records() for rung in rungs)
    else:
        card = make_scorecard(products[0].plan, journal, results, reporter, machine)
        records = tensor_records(products[0].plan, journal.units)
    tensors = {scorecards.TENSORS_FILE: jsonl(records)}
    prepare(output, told_files(card, plans.undertaking.told, start, tensors))
    scorecards.write(card, output)
    put(output)
    _require_passed(card, output)
    if whole and not rungs:
        _remember(planned, card, placement)
    return card


def _product(plan: Plan, checkpoint: Checkpoint, fetch: Callable[[str], Packed], variant: str | None = None) -> Product:
    return Product(plan, with_beside(plan, checkpoint, fetch), variant)


def _require_passed(card: Scorecard, output: Path) -> None:
    if not card.gate.passed:
        failed = [check for check in card.gate.checks if not check.passed]
        raise GateFailed(
            f"gate failed: {failed[0].name}: {failed[0].detail}; the artifacts are in {output / 'rejected'}, "
            f"the figures in {output / scorecards.FILE_NAME}"
        )


def _announce(plans: _Plans, journal: Journal, reporter: Reporter) -> None:
    """What is to be said before the work: fallbacks, warnings, how much is done."""
    for name, plan in plans.by_variant.items():
        if plan.exchanges:
            total, roles = sum(e.tensors for e in plan.exchanges), dict.fromkeys(e.role for e in plan.exchanges)
            whose = f"{name}: " if name else ""
            told = f"{whose}{count_of(total)} of {', '.join(roles)} get another codec than the recipe's, which their rows do not fit"
            reporter.say(f"note: {told}; compress plan says which, and what avoids it")
    for warning in dict.fromkeys(warning for plan in plans.by_variant.values() for warning in plan.warnings):
        reporter.say(f"note: {warning}")
    if journal.units:
        units = ["embeddings", *(f"block-{n:05d}" for n in range(plans.lead.spec.layers)), "head"]
        units += [RECOVERED] if tunes_end_to_end(plans.lead) else []
        done = sum(unit in journal for unit in units)
        reporter.say(f"continuing: {done} of {len(units)} units are already done")


def _remember(plan: Plan, card: Scorecard, placement: Placement) -> None:
    """What a run took that was not interrupted, for the plans to come."""
    seconds = sum(stage.seconds for stage in card.stages)
    run = Measured(plan.identity.version, card.created or "", seconds, work(plan))
    runs_like(plan, look(), placement.device.type).remember(run)


def _finished(plans: _Plans, output: Path) -> Scorecard | None:
    """The scorecard of a run that has done all this already, see `claim.finished`."""
    lead = plans.lead

    def digest() -> str:
        text = checksum(load_calibration(lead).tobytes()) if lead.needs_calibration else None
        return run_digest(plans.undertaking.digest, text, lead.recipe)

    card = finished(output, digest)
    if card is not None:
        put(output)
    return card
