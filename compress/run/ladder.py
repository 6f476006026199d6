"""Several plans of one model in one pass over its blocks and the calibration text: what solvers see is the original's, so it is
collected once; an importance matrix for llama.cpp comes of it, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from compress.codecs import float_codec
from compress.decode import decode
from compress.export.deliver import Delivery
from compress.export.imatrix import Importance, ImportanceMatrix, write_dat, write_gguf
from compress.models.checkpoint import Checkpoint
from compress.models.layers.views import Piece
from compress.plan.plan import Plan
from compress.report.checksums import checksums
from compress.report.progress import Reporter, StageProgress
from compress.report.scorecard import LayerError, Scorecard
from compress.run.claim import PRODUCTS, TEXT, Undertaking
from compress.run.records import tensor_line, tensor_records
from compress.run.source import working_model
from compress.run.sublayer import compress_variants
from compress.run.summary import make_scorecard
from compress.run.units import Run, beside_units, head_seen, solve_beside, solve_embeddings, solve_head, surveyed_head
from compress.scoring.results import Fallback
from compress.solve.tensor import Solved
from compress.statistics import Statistics
from compress.streaming.journal import Journal
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import BlockAt, advance, embed, walk
from compress.weights import Packed

IMATRIX = "imatrix"  # of what a unit holds: sums of squared inputs
OF = "@"  # between a unit and the type whose tensors it holds


@dataclass(frozen=True)
class Rung:
    """One type of a ladder: its plan, and its part of the journal that all share, which reads like a journal of its own."""

    name: str
    plan: Plan
    journal: Journal

    def key(self, tensor: str) -> str:
        """What the journal calls a tensor of this type."""
        return f"{self.name}:{tensor}"

    def fetch(self, tensor: str) -> Packed:
        """One packed tensor."""
        return self.journal.fetch(self.key(tensor))

    def unit(self, unit: str) -> str:
        """What the journal calls a unit of this type."""
        return f"{unit}{OF}{self.name}"

    @property
    def units(self) -> dict[str, Any]:
        """Reports of the units: what is said for all types, and for this one."""
        told = self.journal.units
        return {unit: {**told[unit], **told.get(self.unit(unit), {})} for unit in told if OF not in unit}

    @property
    def digest(self) -> str:
        return self.journal.digest

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.journal.inputs

    def __contains__(self, unit: str) -> bool:
        return unit in self.journal

    def records(self) -> Iterator[dict[str, Any]]:
        """Its lines of tensors.jsonl."""
        return ({"variant": self.name, **record} for record in tensor_records(self.plan, self.units))


def leading(plans: Sequence[Plan]) -> Plan:
    """The plan that says what text is read: the first that reads some, since a type that only rounds needs none."""
    return next((plan for plan in plans if plan.needs_calibration), plans[0])


# ---------------------------------------------------------------- units


def compress_ladder(
    rungs: Sequence[Rung],
    checkpoint: Checkpoint,
    journal: Journal,
    reporter: Reporter,
    placement: Placement = CPU,
    ids: np.ndarray | None = None,
) -> None:
    """Every unit that the journal does not hold yet, for all types. ids: calibration windows [samples, length]."""
    lead = leading([rung.plan for rung in rungs])
    if ids is not None:
        journal.agree(TEXT, ids.tobytes())
        journal.agree(PRODUCTS, placement.products.encode())
    if not lead.solves:
        ids = None
    shape = None if ids is None else (*ids.shape, lead.spec.hidden_size)

    def tell(report: Solved) -> None:
        reporter.say(f"  {tensor_line(report)}", level=2)

    run = Run(lead, working_model(lead, checkpoint), journal, placement, shape, tell)
    with reporter.stage("embeddings"):
        if "embeddings" not in journal:
            _embeddings(run, rungs, ids)
    with reporter.stage("blocks") as progress:
        layers = lead.spec.layers
        left = [layer for layer in range(layers) if f"block-{layer:05d}" not in journal]
        for block in walk(lead.spec, run.load, placement, layers=left):
            what = f"block {block.layer + 1} of {layers}"
            _block(run, rungs, block, _after(block.layer, layers, partial(_told, progress, what)))
    with reporter.stage("head"):
        if "head" not in journal:
            _head(run, rungs)
    for unit, names in beside_units([rung.plan for rung in rungs]):
        if unit not in journal:
            _finish(run, rungs, unit, [solve_beside(replace(run, plan=rung.plan), names) for rung in rungs])


def _after(before: int, total: int, progress: Callable[[float], None]) -> Callable[[float], None]:
    """Progress of what comes behind `before` of `total` parts, in parts."""
    return lambda done: progress((before + done) / total)


def _told(progress: StageProgress, what: str, done: float) -> None:
    progress(done, what)


def _finish(
    run: Run, rungs: Sequence[Rung], unit: str, found: Sequence[tuple[Mapping[str, Packed], Any]], **common: Any
) -> None:
    """Name a unit of all types at once, each in a file of its own. found: of each type its packed tensors and its report; common:
    what is said for all."""
    run.journal.write(unit, common.pop(IMATRIX, {}))
    reports: dict[str, Any] = {unit: common}
    for rung, (own, report) in zip(rungs, found, strict=True):
        run.journal.write(rung.unit(unit), {rung.key(name): packed for name, packed in own.items()})
        reports[rung.unit(unit)] = report
    run.journal.name(reports)


def _embeddings(run: Run, rungs: Sequence[Rung], ids: np.ndarray | None) -> None:
    survey = None if ids is None else cache(partial(surveyed_head, run, ids))
    name = run.plan.spec.embeddings
    found = _each(rungs, [name], lambda plan: solve_embeddings(replace(run, plan=plan), survey))
    if ids is not None and (streams := run.streams(0)) is not None:
        embed(run.plan.spec, run.load(run.plan.spec.embeddings), ids, streams.compressed)
        run.journal.keep(*streams.paths)
    _finish(run, rungs, "embeddings", [({name: packed}, report) for packed, report in found])


def _block(run: Run, rungs: Sequence[Rung], block: BlockAt, progress: Callable[[float], None]) -> None:
    """All sub-layers of one block, of every type; then its line in the journal."""
    total = len(rungs[0].plan.block(block.layer))
    at = [run.streams(block.layer, part) for part in range(len(block.branches) + 1)]
    packed: list[dict[str, Packed]] = [{} for _ in rungs]
    solved: list[list[dict[str, Any]]] = [[] for _ in rungs]
    tokens: Sequence[int] = ()
    squares: dict[str, Packed] = {}
    counts: dict[str, int] = {}
    for branch in block.branches:
        variants = [[t for t in rung.plan.block(block.layer) if t.spec.part == branch.part] for rung in rungs]
        job = replace(run.job, original_inputs=True, squares=True)
        source, target = at[branch.part], at[branch.part + 1]
        with run.placement.observing():
            results = compress_variants(branch, variants, source, job, _after(len(packed[0]), total, progress))
            if source is not None and target is not None:
                advance(branch, results[0].original, source.compressed, target.compressed)
        for number, result in enumerate(results):
            packed[number] |= result.packed
            solved[number] += [vars(report) for report in result.solved]
        tokens = list(results[0].tokens) or tokens
        for key, (sums, count) in results[0].squares.items():
            squares[_squares(block.layer, key)] = float_codec("f32").encode(sums.cpu())
            counts[key] = count
    if (behind := at[-1]) is not None:
        run.journal.keep(*behind.paths)
    run.journal.release(*(path for streams in at[:-1] if streams is not None for path in streams.paths))
    found = [(own, {"solved": lines, "folded": []}) for own, lines in zip(packed, solved, strict=True)]
    _finish(run, rungs, f"block-{block.layer:05d}", found, tokens=tokens, imatrix=squares, counts=counts)
    progress(1.0)


def _head(run: Run, rungs: Sequence[Rung]) -> None:
    """The last norm, and the head where it is not the embeddings."""
    streams = run.streams(run.plan.spec.layers)
    found: list[Statistics] = []

    def seen(norm: Packed) -> Statistics:  # the original's, whatever the norm ships as
        assert streams is not None
        if not found:
            found.append(head_seen(run, streams, norm))
        return found[0]

    spec = run.plan.spec
    observe = None if streams is None else seen
    made = _each(rungs, [spec.final_norm, spec.head], lambda plan: solve_head(replace(run, plan=plan), observe))
    if streams is not None:
        run.journal.release(*streams.paths)
    _finish(run, rungs, "head", made)


Made = TypeVar("Made")


def _each(rungs: Sequence[Rung], names: Sequence[str], solve: Callable[[Plan], Made]) -> list[Made]:
    """What is made of some tensors for each type; once where types have them alike."""
    found: list[Made] = []
    for number, rung in enumerate(rungs):
        plan, earlier = rung.plan.by_name, [other.plan.by_name for other in rungs[:number]]
        twins = (n for n, other in enumerate(earlier) if all(plan[name].same_work(other[name]) for name in names))
        twin = next(twins, None)
        found.append(solve(rung.plan) if twin is None else found[twin])
    return found


# ---------------------------------------------------------------- importance matrix


def _squares(layer: int, key: str) -> str:
    """What the journal calls the sums of one input."""
    return f"{IMATRIX}:{layer}:{key}"


def write_imatrix(rungs: Sequence[Rung], output: Path) -> dict[str, str]:
    """Write the importance matrix in both formats, where any file is for llama.cpp and text was read. Returns sha256 by name."""
    lead, journal = leading([rung.plan for rung in rungs]), rungs[0].journal
    matrix = importance_matrix(lead, journal)
    if not matrix.tensors or not any("ggml" in c.kinds for rung in rungs for c in rung.plan.recipe.containers):
        return {}
    paths = [output / f"{lead.identity.name}-imatrix{suffix}" for suffix in (".gguf", ".dat")]
    write_gguf(paths[0], matrix)
    write_dat(paths[1], matrix)
    return checksums(paths, output)


def importance_matrix(plan: Plan, journal: Journal) -> ImportanceMatrix:
    """What the journal of a ladder knows of every linear's inputs, by GGUF tensor; experts are stacked."""
    rows: dict[str, list[tuple[int, np.ndarray, int]]] = {}
    for tensor in plan.spec.tensors():
        if tensor.layer is None or tensor.input is None:
            continue
        counts = journal.units[f"block-{tensor.layer:05d}"]["counts"]
        if tensor.input not in counts:
            continue
        sums = decode(journal.fetch(_squares(tensor.layer, tensor.input)))
        for piece in tensor.pieces:
            if piece.exact and piece.shape is None:  # of others a row does not meet these inputs
                row = (tensor.expert or 0, _in_order(piece, sums), counts[tensor.input])
                rows.setdefault(piece.name, []).append(row)
    stacked = {
        name: Importance(np.stack([sums for _, sums, _ in found]), np.array([count for *_, count in found], np.float32))
        for name, unordered in rows.items()
        if (found := sorted(unordered, key=lambda row: row[0]))
    }
    text = plan.recipe.calibration
    return ImportanceMatrix(stacked, text.source.label, text.samples, text.length)


def _in_order(piece: Piece, sums: Tensor) -> np.ndarray:
    """Sums of a tensor's columns as they stand in a GGUF file."""
    return (sums if piece.columns is None else sums[torch.from_numpy(piece.columns.index(len(sums)))]).numpy()


# ---------------------------------------------------------------- scorecard


def ladder_scorecard(
    undertaking: Undertaking,
    rungs: Sequence[Rung],
    results: Delivery,
    reporter: Reporter,
    machine: Mapping[str, Any],
    beside: Mapping[str, str],
) -> Scorecard:
    """One scorecard for all types. machine: of `provenance.machine`; beside: files made beside the artifacts."""
    first = leading([rung.plan for rung in rungs])
    lead = next(rung for rung in rungs if rung.plan is first)
    card = make_scorecard(lead.plan, lead, results, reporter, machine)
    own = {rung.name: make_scorecard(rung.plan, rung, Delivery(), reporter, machine) for rung in rungs}
    errors = [_of(name, error) for name, found in own.items() for error in found.errors]
    return card.model_copy(
        update={
            "recipe": undertaking.told["name"],
            "fallbacks": (*_fallbacks({name: found.fallbacks for name, found in own.items()}), *results.fallbacks),
            "errors": tuple(errors),
            "notes": tuple(dict.fromkeys(note for found in (card, *own.values()) for note in found.notes)),
            "recipe_digest": undertaking.recipe_digest,
            "beside": dict(beside),
        }
    )


def _of(variant: str, error: LayerError) -> LayerError:
    return error.model_copy(update={"variant": variant})


def _fallbacks(told: Mapping[str, Sequence[Fallback]]) -> Iterator[Fallback]:
    """What befell all types once, of the others whose it is."""
    common = set.intersection(*(set(lines) for lines in told.values()))
    yield from (line for line in next(iter(told.values())) if line in common)
    for name, lines in told.items():
        yield from (
            line.model_copy(update={"subject": f"{name}: {line.subject}"}) for line in lines if line not in common
        )
