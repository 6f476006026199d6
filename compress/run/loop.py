"""The loop: plan, then block by block collect, solve, forward, journal; then containers, gate, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.codecs import float_codec
from compress.decode import decode
from compress.errors import CompressError, GateFailed
from compress.export.deliver import Delivery, deliver, require_texts
from compress.export.text import plan_tokenizer
from compress.files import checksum, locked
from compress.machine import look
from compress.machine.measured import Measured
from compress.models.checkpoint import Checkpoint
from compress.plan.causes import count_of
from compress.plan.duration import runs_like, work
from compress.plan.make import make_plan
from compress.plan.plan import Plan
from compress.plan.tensor import PlannedTensor, surveys_head
from compress.plan.texts import read_texts
from compress.recipe.schema import Recipe
from compress.recover.block import SolvedBlock, recover_block
from compress.recover.sensitivity import output_sensitivity
from compress.report import scorecard as scorecards
from compress.report.progress import Reporter
from compress.report.scorecard import Scorecard
from compress.run.claim import TEXT, WORK, claim, finished, open_journal, run_digest
from compress.run.head import head_statistics, survey_head
from compress.run.inspect import INSPECTED, inspect
from compress.run.records import tensor_line
from compress.run.recover import RECOVERED, outcomes_file, recover_end_to_end, tunes_end_to_end
from compress.run.sublayer import Job, compress_sublayer
from compress.run.surveys import settle
from compress.run.told import Expected, put, tell
from compress.solve.files import save_outcomes
from compress.solve.tensor import Outcome, Solved, as_stored, solve_tensor
from compress.streaming.activations import Activations
from compress.streaming.journal import LOCK, Journal, discard
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import BlockAt, Streams, advance, embed, walk
from compress.text import CalibrationText, calibration_text
from compress.weights import Loader, Packed

if TYPE_CHECKING:
    import numpy as np


SENSITIVITY = "sensitivity"  # the unit that holds what `recover` weighs errors by
# A tied table is looked up row by row (every column counts the same) and multiplied as the head (columns count as the
# final hidden states say): the head's gram with this much of its mean on the diagonal stands for both.
LOOKUP_DAMPING = 0.1
SURVEY_TOKENS_PER_COLUMN = 64


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
    reporter, placement = reporter or Reporter(0), Placement.choose(device)
    output = Path(recipe.output)
    with ExitStack() as held:
        with reporter.stage("plan"):
            early = _planned(recipe, expected)
            claim(output, early, fresh=fresh)
            if not early.stamp:  # before weights are downloaded: all that config.json, tokenizer and texts tell
                read_texts(early)
            held.enter_context(locked(output / WORK / LOCK, output))
            plan = _planned(recipe, expected, weights=True)
            claim(output, plan, fresh=fresh)
            card = None if fresh else _finished(plan, output)
            journal = open_journal(output, plan, fresh=fresh) if card is None else None
            if journal is not None:
                reporter.continue_times(journal.folder, plan.digest)
        if journal is None:
            reporter.say(f"already done: {output} holds what this recipe makes, unchanged; --fresh makes it anew")
        else:
            card = _carry_out(plan, journal, output, reporter, placement, Demands(strict, expected))
        if not keep_work:
            discard(output / WORK)
    assert card is not None
    return card


@dataclass(frozen=True)
class Demands:
    """What a run must not go on without: nothing that speaks against the original, what another one started from."""

    strict: bool = False
    expected: Expected | None = None


def _planned(recipe: Recipe, expected: Expected | None, *, weights: bool = False) -> Plan:
    plan = make_plan(recipe, weights=weights)
    return plan if expected is None else expected.plan(plan)


def _carry_out(
    plan: Plan, journal: Journal, output: Path, reporter: Reporter, placement: Placement, demands: Demands
) -> Scorecard:
    """All of a run once there is something to do: solve, deliver, tell. Raises GateFailed when that is told."""
    if plan.exchanges:
        total, roles = sum(e.tensors for e in plan.exchanges), dict.fromkeys(e.role for e in plan.exchanges)
        told = (
            f"{count_of(total)} of {', '.join(roles)} get another codec than the recipe's, which their rows do not fit"
        )
        reporter.say(f"note: {told}; compress plan says which, and what avoids it")
    for warning in plan.warnings:
        reporter.say(f"note: {warning}")
    planned, whole = plan, not journal.units
    if journal.units:
        units = ["embeddings", *(f"block-{n:05d}" for n in range(plan.spec.layers)), "head"]
        units += [RECOVERED] if tunes_end_to_end(plan) else []
        done = sum(unit in journal for unit in units)
        reporter.say(f"continuing: {done} of {len(units)} units are already done")
    strict, expected = demands.strict, demands.expected
    try:
        checkpoint = Checkpoint.open(plan.place)
        if expected is not None:
            with reporter.stage("compare original"):
                other = expected.require_original(checkpoint)
            for line in other:
                reporter.say(f"note: {line}")
        with reporter.stage("tokenizer"):
            result = Delivery(strict=strict, fallbacks=list(require_texts(plan, reporter)))
        ids = None
        if plan.needs_calibration:  # before the weights: what is wrong with it is known in seconds
            with reporter.stage("calibration text") as progress:
                text = read_calibration(plan, progress)
            for line in text.lines:
                reporter.say(f"note: calibration text: {line}")
            if expected is not None:
                expected.require_text(text.ids.tobytes())
            ids, plan = text.ids, plan.saying(tuple(f"calibration text: {line}" for line in text.lines))
        inspect(plan, checkpoint, journal, reporter, strict)
        with torch.inference_mode():
            plan = compress_model(plan, checkpoint, journal, reporter, placement, ids)
            results = deliver(plan, checkpoint, journal, output, reporter, placement, result)
    except CompressError:
        if not set(journal.units) - {INSPECTED}:  # nothing to go on from: the next run may be another recipe's
            discard(journal.folder)
        raise
    card = tell(plan, journal, checkpoint, results, reporter, str(placement.device))
    if not card.gate.passed:
        failed = [check for check in card.gate.checks if not check.passed]
        raise GateFailed(
            f"gate failed: {failed[0].name}: {failed[0].detail}; the artifacts are in {output / 'rejected'}, "
            f"the figures in {output / scorecards.FILE_NAME}"
        )
    if whole:
        _remember(planned, card, placement)
    return card


def _remember(plan: Plan, card: Scorecard, placement: Placement) -> None:
    """What a run took that was not interrupted, for the plans to come."""
    seconds = sum(stage.seconds for stage in card.stages)
    run = Measured(plan.identity.version, card.created or "", seconds, work(plan))
    runs_like(plan, look(), placement.device.type).remember(run)


def _finished(plan: Plan, output: Path) -> Scorecard | None:
    """The scorecard of a run that has done all this already, see `claim.finished`."""

    def digest() -> str:
        text = checksum(load_calibration(plan).tobytes()) if plan.needs_calibration else None
        return run_digest(plan.digest, text, plan.recipe)

    card = finished(output, digest)
    if card is not None:
        put(output)
    return card


def compress_model(
    plan: Plan,
    checkpoint: Checkpoint,
    journal: Journal,
    reporter: Reporter,
    placement: Placement = CPU,
    ids: np.ndarray | None = None,
) -> Plan:
    """Every unit that the journal does not hold yet: what the plan leaves open, embeddings, blocks, head, what end-to-end
    recovery moved. ids: calibration windows [samples, length] where they are read already. Returns the plan as it was
    carried out."""
    if ids is None and plan.needs_calibration:
        ids = load_calibration(plan)
    if ids is not None:
        journal.agree(TEXT, ids.tobytes())
    plan, load = settle(plan, checkpoint, journal, ids, reporter, placement)
    spec = plan.spec
    if not plan.solves:
        ids = None
    shape = None if ids is None else (*ids.shape, spec.hidden_size)
    run = Run(plan, load, journal, placement, shape, lambda report: reporter.say(f"  {tensor_line(report)}", level=2))
    with reporter.stage("embeddings"):
        if "embeddings" not in journal:
            _embeddings(run, ids)
    if plan.recover is not None and plan.recover.loss == "sensitivity" and ids is not None:
        with reporter.stage("sensitivity") as progress:
            if SENSITIVITY not in journal:
                _survey_sensitivity(run, ids, progress)
    with reporter.stage("blocks") as progress:
        left = [layer for layer in range(spec.layers) if f"block-{layer:05d}" not in journal]
        for block in walk(spec, load, placement, layers=left):
            n, what = block.layer, f"block {block.layer + 1} of {spec.layers}"

            def within(part: float, n: int = n, what: str = what) -> None:
                progress((n + part) / spec.layers, what)

            _block(run, block, within)
    with reporter.stage("head"):
        if "head" not in journal:
            _head(run)
    if tunes_end_to_end(plan) and ids is not None:
        with reporter.stage("recover") as progress:
            if RECOVERED not in journal:
                streams = run.streams(spec.layers)
                assert streams is not None and streams.original is not None
                recover_end_to_end(run, ids, streams.original, progress)
    return plan


def load_calibration(plan: Plan) -> np.ndarray:
    """Token windows [samples, length] of the recipe's calibration text."""
    return read_calibration(plan).ids


def read_calibration(plan: Plan, progress: Callable[[float, str], None] | None = None) -> CalibrationText:
    """The same with what deserves a line of how it was read."""
    settings = plan.recipe.calibration
    return calibration_text(
        settings.source,
        plan_tokenizer(plan),
        samples=settings.samples,
        length=settings.length,
        seed=plan.recipe.seed,
        max_positions=plan.spec.max_positions,
        progress=progress,
    )


@dataclass(frozen=True)
class Run:
    """What every unit of a run needs. shape: of the calibration activations, None where no text is read; tell: hears of every
    tensor that is solved."""

    plan: Plan
    load: Loader
    journal: Journal
    placement: Placement
    shape: tuple[int, int, int] | None = None
    tell: Callable[[Solved], None] = lambda report: None

    @property
    def job(self) -> Job:
        """What is asked of every sub-layer."""
        return Job(self.load, self.plan.transforms, self.plan.recipe.seed, self.placement, self.tell)

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the model, float32 on the device."""
        return self.placement.weight(self.load(name))

    def activations(self, name: str) -> Activations:
        """A file of the shape of the text."""
        assert self.shape is not None
        return Activations(self.journal.folder / f"{name}.f32", self.shape, self.placement.device)

    def streams(self, layer: int, part: int = 0) -> Streams | None:
        """The activations in front of a sub-layer; behind the last one those in front of the next block."""
        if self.shape is None:
            return None
        if part and part == len(self.plan.spec.blocks[layer]):
            layer, part = layer + 1, 0
        place = f"{layer:05d}" + (f"-{part}" if part else "")
        original = self.activations(f"original-{place}") if self.plan.two_streams else None
        return Streams(self.activations(f"activations-{place}"), original)


def _embeddings(run: Run, ids: np.ndarray | None) -> None:
    """The embedding table; a tied one with few bits is solved for what it does as the head, see LOOKUP_DAMPING."""
    plan, spec, journal = run.plan, run.plan.spec, run.journal
    table = plan.by_name[spec.embeddings]
    if ids is None or table.solver is None or not surveys_head(spec, table.spec, table.codec):
        packed, report = _alone(run, table)
    else:
        wanted = -(-SURVEY_TOKENS_PER_COLUMN * spec.hidden_size // ids.shape[1])
        statistics = survey_head(spec, run.load, ids[:wanted], run.placement)
        solver = table.solver
        if "damping" in type(solver).model_fields:
            solver = solver.model_copy(update={"damping": max(solver.asks.damping, LOOKUP_DAMPING)})
        outcome = solve_tensor(replace(table, solver=solver), run.weight(table.name), statistics, plan.recipe.seed)
        run.tell(outcome.report)
        packed, report = outcome.pack(), {"solved": [vars(outcome.report)]}
    if ids is not None and (streams := run.streams(0)) is not None:
        embed(decode(packed), ids, streams.compressed)
        if streams.original is not None:
            embed(run.load(table.name), ids, streams.original)
        journal.keep(*streams.paths)
    journal.finish("embeddings", {table.name: packed}, report)


def _alone(run: Run, planned: PlannedTensor) -> tuple[Any, dict]:
    """A tensor without inputs of its own: embeddings, the last norm."""
    if planned.method is None:
        return as_stored(planned, run.load(planned.name)), {}
    outcome = solve_tensor(planned, run.weight(planned.name), None, run.plan.recipe.seed)
    run.tell(outcome.report)
    return outcome.pack(), {"solved": [vars(outcome.report)]}


def _block(run: Run, block: BlockAt, progress: Callable[[float], None]) -> None:
    """All sub-layers of one block, then its line in the journal; with that its inputs go."""
    plan, planned = run.plan, run.plan.block(block.layer)
    at = [run.streams(block.layer, part) for part in range(len(block.branches) + 1)]
    packed: dict[str, Packed] = {}
    report: dict[str, Any] = {"solved": [], "folded": [], "tokens": []}
    outcomes: dict[str, Outcome] = {}
    for branch in block.branches:
        tensors = [t for t in planned if t.spec.part == branch.part]
        before, source, target = len(packed), at[branch.part], at[branch.part + 1]
        share = lambda done, before=before: progress((before + done) / len(planned))  # noqa: E731
        result = compress_sublayer(branch, tensors, source, run.job, share)
        if source is not None and target is not None:
            advance(branch, result.weights, source.compressed, target.compressed)
            if source.original is not None and target.original is not None:
                advance(branch, result.original, source.original, target.original)
        packed |= result.packed
        report["solved"] += [vars(s) for s in result.solved]
        report["folded"] += [vars(f) for f in result.folded]
        report["tokens"] = list(result.tokens) or report["tokens"]
        outcomes |= {name: o for name, o in result.outcomes.items() if isinstance(o, Outcome)}
    if plan.recover is not None and at[0] is not None:
        outcomes = _recover(run, block, packed, outcomes, [s for s in at if s is not None], report)
    if tunes_end_to_end(plan):
        save_outcomes(outcomes_file(run.journal, block.layer), outcomes)
        run.journal.keep(outcomes_file(run.journal, block.layer))
    if (behind := at[-1]) is not None:
        run.journal.keep(*behind.paths)
    run.journal.release(*(path for streams in at[:-1] if streams is not None for path in streams.paths))
    run.journal.finish(f"block-{block.layer:05d}", packed, report)
    progress(1.0)


def _recover(
    run: Run,
    block: BlockAt,
    packed: dict[str, Packed],
    outcomes: dict[str, Outcome],
    at: Sequence[Streams],
    report: dict[str, Any],
) -> dict[str, Outcome]:
    """Tune what a solved block keeps in float, between the activations at its input and those at its output; into `packed`
    and `report`, the activations behind it anew. Returns the block's outcomes as they ship."""
    plan, put = run.plan, run.placement.put
    name = f"{SENSITIVITY}.{block.layer}"
    metric = put(decode(run.journal.fetch(name))) if SENSITIVITY in run.journal else None
    floats = {name: put(decode(value)) for name, value in packed.items() if name not in outcomes}
    assert plan.recover is not None and at[-1].original is not None
    recovered = recover_block(
        SolvedBlock(block, outcomes, floats, {name: packed[name].codec for name in floats}),
        at[0].compressed,
        at[-1].original,
        plan.recover,
        metric=metric,
        seed=plan.recipe.seed,
    )
    report["recovered"] = recovered.report
    if not recovered.kept:
        return outcomes
    packed |= {name: outcome.pack() for name, outcome in recovered.outcomes.items()}
    packed |= {name: as_stored(plan.by_name[name], value) for name, value in recovered.floats.items()}
    weights = {name: put(decode(value)) for name, value in packed.items()}
    for branch in block.branches:
        advance(branch, weights, at[branch.part].compressed, at[branch.part + 1].compressed)
    return dict(recovered.outcomes)


def _survey_sensitivity(run: Run, ids: np.ndarray, progress: Callable[[float], None]) -> None:
    """What the original's loss feels of an error at each block's output, as a unit of its own."""
    recover = run.plan.recover
    assert recover is not None
    ids = ids[: recover.survey]
    few = replace(run, shape=(*ids.shape, run.plan.spec.hidden_size))
    plan = run.plan
    metrics = output_sensitivity(plan.spec, run.load, ids, few.activations, plan.recipe.seed, run.placement, progress)
    exact = float_codec("f32")
    run.journal.finish(SENSITIVITY, {f"{SENSITIVITY}.{n}": exact.encode(m) for n, m in enumerate(metrics)}, {})


def _head(run: Run) -> None:
    """The last norm, and the head where it is not the embeddings."""
    plan, spec = run.plan, run.plan.spec
    norm = plan.by_name[spec.final_norm]
    packed = {norm.name: as_stored(norm, run.load(norm.name))}
    report: dict[str, Any] = {}
    streams = run.streams(spec.layers)
    if not spec.tied:
        head = plan.by_name[spec.head]
        if head.method is not None and streams is not None:
            stored = run.placement.put(decode(packed[norm.name]))
            statistics = head_statistics(spec, stored, streams, bool(head.asks.drift))
            outcome = solve_tensor(head, run.weight(head.name), statistics, plan.recipe.seed)
            run.tell(outcome.report)
            packed[head.name], report = outcome.pack(), {"solved": [vars(outcome.report)]}
        else:
            packed[head.name], report = _alone(run, head)
    if streams is not None:  # the original's final states are what the last stage tunes for
        run.journal.release(*([streams.compressed.path] if tunes_end_to_end(plan) else streams.paths))
    run.journal.finish("head", packed, report)
