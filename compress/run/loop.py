"""The loop: plan, then block by block collect, solve, forward, journal; then containers, gate, scores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.codecs import get_codec
from compress.errors import GateFailed, OutputError
from compress.export.deliver import deliver, require_texts
from compress.models.checkpoint import Checkpoint
from compress.plan.plan import Plan, make_plan
from compress.plan.tensor import PlannedTensor, surveys_head
from compress.recipe.schema import Recipe
from compress.recover.block import Recovered, output_sensitivity, recover_block
from compress.recover.end_to_end import RECOVERED, outcomes_file, recover_end_to_end, tunes_end_to_end
from compress.report import scorecard as scorecards
from compress.report.progress import Reporter
from compress.report.scorecard import Scorecard
from compress.run.half import compress_half, head_statistics, survey_head
from compress.run.scaling import Folded
from compress.run.summary import make_scorecard
from compress.run.surveys import settle
from compress.solve.files import save_outcomes
from compress.solve.tensor import Outcome, Solved, as_stored, decode, solve_tensor
from compress.streaming.journal import Activations, Journal, write_synced
from compress.streaming.walk import HALVES, Streams, advance, embed
from compress.text import calibration_windows, load_tokenizer
from compress.weights import Loader, Packed

if TYPE_CHECKING:
    import numpy as np


WORK = ".work"
SENSITIVITY = "sensitivity"  # the unit that holds what `recover` weighs errors by
# A tied table is looked up row by row (every column counts the same) and multiplied as the head (columns count as the
# final hidden states say): the head's gram with this much of its mean on the diagonal stands for both.
LOOKUP_DAMPING = 0.1
SURVEY_TOKENS_PER_COLUMN = 64


def run(recipe: Recipe, *, fresh: bool = False, keep_work: bool = False, reporter: Reporter | None = None) -> Scorecard:
    """Carry out a recipe and return its scorecard; artifacts lie in `recipe.output`.

    A run that was killed continues where it stopped. Raises GateFailed (exit code 3) after writing the scorecard when
    an artifact is not fit to deliver, and the other CompressErrors before anything has its final name.
    """
    reporter = reporter or Reporter(0)
    with reporter.stage("plan"):
        claim(Path(recipe.output), make_plan(recipe), fresh=fresh)  # before a hub download: all that config.json tells
        plan = make_plan(recipe, weights=True)
        output = claim(Path(recipe.output), plan, fresh=fresh)
        journal = Journal.open(output / WORK, plan.digest, fresh=fresh)
    for warning in plan.warnings:
        reporter.say(f"note: {warning}")
    if journal.units:
        units = ["embeddings", *(f"block-{n:05d}" for n in range(plan.spec.layers)), "head"]
        units += [RECOVERED] if tunes_end_to_end(plan) else []
        done = sum(unit in journal for unit in units)
        reporter.say(f"continuing: {done} of {len(units)} units are already done")
    checkpoint = Checkpoint.open(plan.source)
    require_texts(plan)
    with torch.inference_mode():
        plan = compress_model(plan, checkpoint, journal, reporter)
        results = deliver(plan, checkpoint, journal, output, reporter)
    card = make_scorecard(plan, journal, results, reporter)
    scorecards.write(card, output)
    write_synced(output / "recipe.json", json.dumps(recipe.as_dict(), indent=2).encode())
    if card.gate.passed and not keep_work:
        shutil.rmtree(output / WORK, ignore_errors=True)
    if not card.gate.passed:
        failed = [check for check in card.gate.checks if not check.passed]
        raise GateFailed(
            f"gate failed: {failed[0].name}: {failed[0].detail}; the artifacts are in {output / 'rejected'}, "
            f"the figures in {output / scorecards.FILE_NAME}"
        )
    return card


def claim(output: Path, plan: Plan, *, fresh: bool = False) -> Path:
    """The output folder, if it can be ours: new, empty, or of this very recipe. Raises OutputError otherwise or on a
    full disk; touches nothing.

    fresh: the folder of another recipe's finished run will do, too.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; choose another --output")
    if output.is_dir():
        names = {p.name for p in output.iterdir()}
        if names and not names & {WORK, scorecards.FILE_NAME}:
            raise OutputError(f"{output} holds something else ({sorted(names)[0]}); choose another --output")
        if scorecards.FILE_NAME in names and not fresh:
            finished = scorecards.read(output)
            if finished.recipe_digest != plan.recipe.digest():
                raise OutputError(
                    f"{output} holds a finished run of another recipe ({finished.recipe}); "
                    "choose another --output, or write into it all the same with --fresh"
                )
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"cannot write into {output}: {nearest} is no folder or read-only; choose another --output")
    free = shutil.disk_usage(nearest).free
    if free < plan.disk_bytes and not (output / WORK).exists():
        raise OutputError(
            f"{output} has {free / 1e9:.2f} GB free, the run needs {plan.disk_bytes / 1e9:.2f} GB; "
            "free some space or choose another --output"
        )
    return output


def compress_model(plan: Plan, checkpoint: Checkpoint, journal: Journal, reporter: Reporter) -> Plan:
    """Every unit that the journal does not hold yet: what the plan leaves open, embeddings, blocks, head, what end-to-end
    recovery moved. Returns the plan as it was carried out."""
    shape: tuple[int, int, int] | None = None
    ids: np.ndarray | None = None
    if plan.needs_calibration:
        with reporter.stage("calibration text"):
            ids = load_calibration(plan)
    plan, load = settle(plan, checkpoint, journal, ids, reporter)
    spec = plan.spec
    if not plan.solves:
        ids = None
    if ids is not None:
        shape = (*ids.shape, spec.hidden_size)
    with reporter.stage("embeddings"):
        if "embeddings" not in journal:
            table = plan.by_name["model.embed_tokens.weight"]
            packed, report = _embeddings(plan, table, load, ids)
            if ids is not None and shape is not None:
                streams = _streams(plan, journal, f"{0:05d}", shape)
                embed(decode(packed), ids, streams.compressed, streams.batch)
                if streams.original is not None:
                    embed(load(table.name), ids, streams.original, streams.batch)
            journal.finish("embeddings", {table.name: packed}, report)
    if plan.recover is not None and plan.recover.loss == "sensitivity" and ids is not None:
        with reporter.stage("sensitivity"):
            if SENSITIVITY not in journal:
                _survey_sensitivity(plan, load, journal, ids)
    with reporter.stage("blocks") as progress:
        for layer in range(spec.layers):
            if f"block-{layer:05d}" not in journal:
                _block(
                    plan,
                    layer,
                    load,
                    journal,
                    shape,
                    lambda part, n=layer: progress((n + part) / spec.layers, f"block {n + 1} of {spec.layers}"),
                )
    with reporter.stage("head"):
        if "head" not in journal:
            _head(plan, load, journal, shape)
    if tunes_end_to_end(plan) and ids is not None:
        with reporter.stage("recover") as progress:
            if RECOVERED not in journal:
                states = _streams(plan, journal, f"{spec.layers:05d}", (*ids.shape, spec.hidden_size)).original
                assert states is not None
                recover_end_to_end(plan, load, journal, ids, states, progress)
    return plan


def load_calibration(plan: Plan) -> np.ndarray:
    """Token windows [samples, length] of the recipe's calibration set."""
    settings = plan.recipe.calibration
    return calibration_windows(
        settings.dataset,
        load_tokenizer(plan.source),
        samples=settings.samples,
        length=settings.length,
        seed=plan.recipe.seed,
        max_positions=plan.spec.max_positions,
    )


def _streams(plan: Plan, journal: Journal, place: str, shape: tuple[int, int, int]) -> Streams:
    """The activation files at a place: the input of a block (`00003`) or of its feed-forward half (`00003-ffn`)."""
    compressed = Activations(journal.folder / f"activations-{place}.f32", shape)
    return Streams(
        compressed, Activations(journal.folder / f"original-{place}.f32", shape) if plan.two_streams else None
    )


def _embeddings(plan: Plan, table: PlannedTensor, load: Loader, ids: np.ndarray | None) -> tuple[Packed, dict]:
    """The embedding table; a tied one with few bits is solved for what it does as the head, see LOOKUP_DAMPING."""
    weight = load(table.name)
    if ids is None or table.solver is None or not surveys_head(plan.spec, table.spec, table.codec):
        return _alone(plan, table, weight)
    wanted = -(-SURVEY_TOKENS_PER_COLUMN * plan.spec.hidden_size // ids.shape[1])
    statistics = survey_head(plan.spec, load, ids[:wanted])
    damping = max(getattr(table.solver, "damping", 0.0), LOOKUP_DAMPING)
    solver = table.solver.model_copy(update={"damping": damping}) if hasattr(table.solver, "damping") else table.solver
    outcome = solve_tensor(replace(table, solver=solver), weight.float(), statistics, plan.recipe.seed)
    return outcome.pack(), {"solved": [vars(outcome.report)]}


def _alone(plan: Plan, planned: PlannedTensor, weight: torch.Tensor) -> tuple[Any, dict]:
    """A tensor without inputs of its own: embeddings, the last norm."""
    if planned.method is None:
        return as_stored(planned, weight), {}
    outcome = solve_tensor(planned, weight.float(), None, plan.recipe.seed)
    return outcome.pack(), {"solved": [vars(outcome.report)]}


def _block(
    plan: Plan,
    layer: int,
    load: Loader,
    journal: Journal,
    shape: tuple[int, int, int] | None,
    progress: Callable[[float], None],
) -> None:
    """Both halves of one block, then its line in the journal; only then its inputs go."""
    block = plan.block(layer)
    places = (f"{layer:05d}", f"{layer:05d}-ffn", f"{layer + 1:05d}")
    at = [None if shape is None else _streams(plan, journal, place, shape) for place in places]
    packed: dict[str, Packed] = {}
    solved: list[Solved] = []
    folded: list[Folded] = []
    outcomes: dict[str, Outcome] = {}
    tokens: tuple[int, ...] = ()
    for half, source, target in zip(HALVES, at[:2], at[1:], strict=True):
        tensors = [t for t in block if t.spec.half == half]
        before = len(packed)
        result = compress_half(
            plan.spec,
            layer,
            half,
            tensors,
            load,
            source,
            lambda done, before=before: progress((before + done) / len(block)),
            transforms=plan.transforms,
            seed=plan.recipe.seed,
        )
        if source is not None and target is not None:
            advance(plan.spec, layer, half, result.weights, source.compressed, target.compressed, source.batch)
            if source.original is not None and target.original is not None:
                advance(plan.spec, layer, half, result.original, source.original, target.original, source.batch)
        packed |= result.packed
        solved += result.solved
        folded += result.folded
        outcomes |= {name: o for name, o in result.outcomes.items() if isinstance(o, Outcome)}
        tokens = result.tokens
    report = {"solved": [vars(s) for s in solved], "folded": [vars(f) for f in folded], "tokens": list(tokens)}
    if plan.recover is not None and at[0] is not None:
        recovered = _recover(plan, layer, journal, packed, outcomes, at[0], at[2])
        report["recovered"] = recovered.report
        if recovered.kept:
            packed |= {name: outcome.pack() for name, outcome in recovered.outcomes.items()}
            packed |= {name: as_stored(plan.by_name[name], value) for name, value in recovered.floats.items()}
            weights = {name: decode(value) for name, value in packed.items()}
            for half, source, target in zip(HALVES, at[:2], at[1:], strict=True):
                advance(plan.spec, layer, half, weights, source.compressed, target.compressed, source.batch)
            outcomes = dict(recovered.outcomes)
    if tunes_end_to_end(plan):
        save_outcomes(outcomes_file(journal, layer), outcomes)
    journal.finish(f"block-{layer:05d}", packed, report)
    for streams in at[:2]:
        if streams is not None:
            streams.delete()
    progress(1.0)


def _recover(
    plan: Plan,
    layer: int,
    journal: Journal,
    packed: Mapping[str, Packed],
    outcomes: Mapping[str, Outcome],
    source: Streams,
    target: Streams,
) -> Recovered:
    """Tune what a solved block keeps in float, between the activations at its input and those at its output."""
    metric = decode(journal.fetch(f"{SENSITIVITY}.{layer}")) if SENSITIVITY in journal else None
    floats = {name: decode(value) for name, value in packed.items() if name not in outcomes}
    assert plan.recover is not None and target.original is not None
    return recover_block(
        plan.spec,
        layer,
        outcomes,
        floats,
        {name: packed[name].codec for name in floats},
        source.compressed,
        target.original,
        plan.recover,
        metric=metric,
        seed=plan.recipe.seed,
    )


def _survey_sensitivity(plan: Plan, load: Loader, journal: Journal, ids: np.ndarray) -> None:
    """What the original's loss feels of an error at each block's output, as a unit of its own."""
    assert plan.recover is not None
    ids = ids[: plan.recover.survey]
    shape = (*ids.shape, plan.spec.hidden_size)

    def scratch(name: str) -> Activations:
        return Activations(journal.folder / f"{name}.f32", shape)

    metrics = output_sensitivity(plan.spec, load, ids, scratch, plan.recipe.seed)
    float_codec = get_codec("f32")
    journal.finish(SENSITIVITY, {f"{SENSITIVITY}.{n}": float_codec.encode(m) for n, m in enumerate(metrics)}, {})


def _head(plan: Plan, load: Loader, journal: Journal, shape: tuple[int, int, int] | None) -> None:
    spec = plan.spec
    norm = plan.by_name["model.norm.weight"]
    packed = {norm.name: as_stored(norm, load(norm.name))}
    report: dict[str, Any] = {}
    head = plan.by_name.get("lm_head.weight")
    streams = None if shape is None else _streams(plan, journal, f"{spec.layers:05d}", shape)
    if head is not None and head.method is not None and streams is not None:
        drift = bool(getattr(head.method, "drift", 0.0))
        statistics = head_statistics(spec, decode(packed[norm.name]), streams, drift)
        outcome = solve_tensor(head, load(head.name).float(), statistics, plan.recipe.seed)
        packed[head.name], report = outcome.pack(), {"solved": [vars(outcome.report)]}
    elif head is not None:
        packed[head.name], report = _alone(plan, head, load(head.name))
    journal.finish("head", packed, report)
    if streams is not None and tunes_end_to_end(plan):
        streams.compressed.delete()  # the original's final states are what the last stage tunes for
    elif streams is not None:
        streams.delete()
