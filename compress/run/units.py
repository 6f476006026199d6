"""The units of a run: what the plan leaves open, embeddings, blocks, head; each is collected, solved, forwarded, and then a line
in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.codecs import float_codec
from compress.decode import decode
from compress.export.text import plan_tokenizer
from compress.models.checkpoint import Checkpoint
from compress.plan.plan import Plan
from compress.plan.tensor import PlannedTensor, surveys_head
from compress.recover.block import SolvedBlock, recover_block
from compress.recover.sensitivity import output_sensitivity
from compress.report.progress import Reporter
from compress.run.claim import PRODUCTS, TEXT
from compress.run.head import head_statistics, survey_head
from compress.run.records import tensor_line
from compress.run.recover import RECOVERED, outcomes_file, recover_end_to_end, tunes_end_to_end
from compress.run.sublayer import Job, compress_sublayer
from compress.run.surveys import settle
from compress.solve.files import save_outcomes
from compress.solve.tensor import Outcome, Solved, as_stored, solve_tensor
from compress.statistics import Statistics
from compress.streaming.activations import Activations
from compress.streaming.journal import Journal
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import BlockAt, Streams, advance, embed, walk
from compress.text import CalibrationText, calibration_text
from compress.weights import Loader, Packed

if TYPE_CHECKING:
    import numpy as np


BESIDE_PARAMETERS = 1 << 26  # of what stands beside the decoder, in a unit at most, but for single tensors
SENSITIVITY = "sensitivity"  # the unit that holds what `recover` weighs errors by
# A tied table is looked up row by row (every column counts the same) and multiplied as the head (columns count as the
# final hidden states say): the head's gram with this much of its mean on the diagonal stands for both.
LOOKUP_DAMPING = 0.1
SURVEY_TOKENS_PER_COLUMN = 64


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
        journal.agree(PRODUCTS, placement.products.encode())
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
    for unit, names in beside_units([plan]):
        if unit not in journal:
            journal.finish(unit, *solve_beside(run, names))
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
        plan = self.plan
        return Job(self.load, plan.transforms, plan.recipe.seed, self.placement, self.tell, plan.original_inputs)

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
    """The embedding table, and the activations that it gives."""
    plan, spec, journal = run.plan, run.plan.spec, run.journal
    packed, report = solve_embeddings(run, None if ids is None else partial(surveyed_head, run, ids))
    if ids is not None and (streams := run.streams(0)) is not None:
        table = run.load(spec.embeddings)
        embed(spec, table if plan.original_inputs else decode(packed), ids, streams.compressed)
        if streams.original is not None:
            embed(spec, table, ids, streams.original)
        journal.keep(*streams.paths)
    journal.finish("embeddings", {spec.embeddings: packed}, report)


def surveyed_head(run: Run, ids: np.ndarray) -> Statistics:
    """Moments of what the original's head sees, on as many windows as its width needs."""
    wanted = -(-SURVEY_TOKENS_PER_COLUMN * run.plan.spec.hidden_size // ids.shape[1])
    return survey_head(run.plan.spec, run.load, ids[:wanted], run.placement)


def solve_embeddings(run: Run, survey: Callable[[], Statistics] | None) -> tuple[Packed, dict[str, Any]]:
    """The embedding table and its report; a tied one with few bits is solved for what it does as the head, see LOOKUP_DAMPING.
    survey: moments of what the original's head sees, where text is read."""
    plan, spec = run.plan, run.plan.spec
    table = plan.by_name[spec.embeddings]
    if survey is None or table.solver is None or not surveys_head(spec, table.spec, table.codec):
        return _alone(run, table)
    solver = table.solver
    if "damping" in type(solver).model_fields:
        solver = solver.model_copy(update={"damping": max(solver.asks.damping, LOOKUP_DAMPING)})
    outcome = solve_tensor(replace(table, solver=solver), run.weight(table.name), survey(), plan.recipe.seed)
    run.tell(outcome.report)
    return outcome.pack(), {"solved": [vars(outcome.report)]}


def _alone(run: Run, planned: PlannedTensor) -> tuple[Packed, dict[str, Any]]:
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
        with run.placement.observing():
            result = compress_sublayer(branch, tensors, source, run.job, share)
            if source is not None and target is not None:
                passed = result.original if plan.original_inputs else result.weights
                advance(branch, passed, source.compressed, target.compressed)
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
    streams = run.streams(run.plan.spec.layers)
    packed, report = solve_head(run, None if streams is None else partial(head_seen, run, streams))
    if streams is not None:  # the original's final states are what the last stage tunes for
        run.journal.release(*([streams.compressed.path] if tunes_end_to_end(run.plan) else streams.paths))
    run.journal.finish("head", packed, report)


def beside_units(plans: Sequence[Plan]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Units of the tensors beside the decoder that any plan rounds, each with their names. plans: of one model."""
    rounded = {t.name for plan in plans for t in plan.outline.beside if t.method is not None}
    names: list[str] = []
    size = number = 0
    for tensor in plans[0].spec.beside:
        if tensor.name not in rounded:
            continue
        if names and size + tensor.parameters > BESIDE_PARAMETERS:
            yield f"beside-{number:05d}", tuple(names)
            names, size, number = [], 0, number + 1
        names.append(tensor.name)
        size += tensor.parameters
    if names:
        yield f"beside-{number:05d}", tuple(names)


def solve_beside(run: Run, names: Sequence[str]) -> tuple[dict[str, Packed], dict[str, Any]]:
    """Those of some tensors beside the decoder that the plan rounds, to nearest: no activations reach them. Packed by name, and
    the report."""
    packed: dict[str, Packed] = {}
    report: dict[str, Any] = {"solved": []}
    for planned in (run.plan.by_name[name] for name in names):
        if planned.method is not None:
            packed[planned.name], told = _alone(run, planned)
            report["solved"] += told["solved"]
    return packed, report


def with_beside(plan: Plan, checkpoint: Checkpoint, fetch: Callable[[str], Packed]) -> Callable[[str], Packed]:
    """A function that gives all that ships by name: what `fetch` has of the decoder, and what goes along as the checkpoint has it."""
    as_it_is = {t.name: t for t in plan.outline.beside if t.method is None}

    def found(name: str) -> Packed:
        return as_stored(as_it_is[name], checkpoint.load(name)) if name in as_it_is else fetch(name)

    return found


def head_seen(run: Run, streams: Streams, norm: Packed) -> Statistics:
    """Moments of what the head sees of the activations behind the last block. norm: the last norm as it ships."""
    plan, spec = run.plan, run.plan.spec
    weight = run.load(spec.final_norm) if plan.original_inputs else decode(norm)
    return head_statistics(spec, run.placement.weight(weight), streams, bool(plan.by_name[spec.head].asks.drift))


def solve_head(run: Run, seen: Callable[[Packed], Statistics] | None) -> tuple[dict[str, Packed], dict[str, Any]]:
    """The last norm and a head of its own, packed by name, and the report. seen: moments of what the head sees behind the norm as
    it ships, where text is read."""
    plan, spec = run.plan, run.plan.spec
    norm = plan.by_name[spec.final_norm]
    packed = {norm.name: as_stored(norm, run.load(norm.name))}
    if spec.tied:
        return packed, {}
    head = plan.by_name[spec.head]
    if head.method is None or seen is None:
        packed[head.name], report = _alone(run, head)
        return packed, report
    outcome = solve_tensor(head, run.weight(head.name), seen(packed[norm.name]), plan.recipe.seed)
    run.tell(outcome.report)
    packed[head.name] = outcome.pack()
    return packed, {"solved": [vars(outcome.report)]}
