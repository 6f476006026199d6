"""What a plan leaves open until the model has been looked at: which layers, experts, heads and channels stay, how sparse each
layer becomes, how large each matrix's factors are. Each answer is a unit of the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.errors import PlanError, ResumeError
from compress.files import write_synced
from compress.models.checkpoint import Checkpoint
from compress.plan.allocation import knapsack, outlier_weighted, pooled_shares
from compress.plan.factors import KNAPSACK_SHARES, factor_bytes
from compress.plan.make import cuts, make_plan
from compress.plan.plan import Plan
from compress.plan.tensor import PlannedTensor, sizes_at
from compress.recipe.schema import Factorize, Prune
from compress.report.progress import Reporter
from compress.run.collect import Site, collect, counted, stage_groups, statistics_of
from compress.run.source import working_model
from compress.streaming.activations import Activations
from compress.streaming.journal import Journal
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Scratch, Stream, Streams, walk
from compress.structured.restructure import Restructured, restructure
from compress.structured.shapes import Cuts
from compress.structured.survey import outlier_ratios
from compress.structured.view import KeptLayer, StructureView
from compress.weights import Loader, Pattern

STRUCTURE, SPARSITY, FACTORS = "structure", "sparsity", "factors"
MOST_SPARSE = 0.95


def settle(
    plan: Plan,
    checkpoint: Checkpoint,
    journal: Journal,
    ids: np.ndarray | None,
    reporter: Reporter,
    placement: Placement = CPU,
) -> tuple[Plan, Loader]:
    """The plan with nothing left open, and the model it is carried out on.

    ids: calibration windows [windows, length] where the plan needs some. Raises NumericalError for activations that are
    not finite, PlanError when a budget cannot be met.
    """
    load = working_model(plan, checkpoint)

    def scratch(name: str) -> Activations:
        assert ids is not None
        return Activations(journal.folder / f"{name}.f32", (*ids.shape, plan.original.hidden_size), placement.device)

    if "structure" in plan.open:
        assert ids is not None
        with reporter.stage("structure") as progress:
            if STRUCTURE not in journal:
                drop, experts, structured = cuts(plan.recipe, plan.turned).values()
                wanted = Cuts(drop, experts, structured, plan.shapes)
                made = restructure(plan.turned, wanted, load, ids, scratch, progress, placement)
                _save(_state_file(journal), *made.state())
                journal.keep(_state_file(journal))
                journal.finish(STRUCTURE, {}, {"structure": dict(made.report)})
            cut = Restructured.restore(plan.turned, *_read(_state_file(journal)))
        again = make_plan(plan.recipe, weights=True, spec=cut.spec).saying(plan.chosen)
        plan = replace(again, identity=plan.identity, repeats=plan.repeats)
        load = partial(cut.view.load, load=load)
    if "sparsity" in plan.open:
        assert ids is not None
        with reporter.stage("outliers"):
            if SPARSITY not in journal:
                journal.finish(SPARSITY, {}, {"sparsity": _sparsities(plan, load, ids, scratch, placement)})
        found = journal.units[SPARSITY]["sparsity"]
        plan = plan.settled({name: Pattern(value) for name, value in found.items()}, {})
    if "factors" in plan.open:
        with reporter.stage("allocation") as progress:
            if FACTORS not in journal:
                journal.finish(FACTORS, {}, {"shares": _shares(plan, load, ids, scratch, progress, placement)})
        plan = plan.settled({}, journal.units[FACTORS]["shares"])
    return plan, load


def stand_in(plan: Plan, load: Loader) -> Loader:
    """A model of the plan's shape without a survey, for a rehearsal: the first of everything that some of stays."""
    if not plan.structural:
        return load
    whole, left = plan.turned, plan.spec

    def kept(layer: int) -> KeptLayer:
        experts = tuple(range(left.experts)) if whole.is_sparse(layer) else ()
        channels = {f"experts.{e}": torch.arange(left.moe_intermediate_size) for e in experts}
        channels |= {
            "mlp": torch.arange(left.intermediate_size),
            "shared": torch.arange(left.shared_intermediate_size),
        }
        return KeptLayer(layer, experts, tuple(range(left.kv_heads)), channels)

    view = StructureView(tuple(kept(n) for n in range(left.layers)), {}, whole, left)
    return partial(view.load, load=load)


# -- sparsity ----------------------------------------------------------------------------------------------------------
def _sparsities(plan: Plan, load: Loader, ids: np.ndarray, scratch: Scratch, placement: Placement) -> dict[str, float]:
    """The share that goes of every pruned tensor: its rule's, moved by how its layer's outliers compare."""
    step: Prune = plan.recipe.step("prune")
    pruned = [[(t.spec, t.pattern) for t in block if t.pattern is not None] for block in plan.blocks]
    sizes = [sum(tensor.parameters for tensor, _ in block) for block in pruned]
    if not any(sizes):
        return {}
    total = sum(tensor.parameters * pattern.sparsity for block in pruned for tensor, pattern in block) / sum(sizes)
    layers = outlier_weighted(
        outlier_ratios(plan.spec, load, ids, scratch, placement=placement), sizes, total, step.spread
    )
    return {
        tensor.name: min(max(pattern.sparsity + layer - total, 0.0), MOST_SPARSE)
        for block, layer in zip(pruned, layers, strict=True)
        for tensor, pattern in block
    }


# -- factors -----------------------------------------------------------------------------------------------------------
def _shares(
    plan: Plan,
    load: Loader,
    ids: np.ndarray | None,
    scratch: Scratch,
    progress: Callable[[float], None],
    placement: Placement,
) -> dict[str, float]:
    """The share of its 16-bit bytes that every factorised tensor keeps; one budget for all that have the same ratio."""
    step: Factorize = plan.recipe.step("factorize")
    matcher = step.matcher(plan.spec)
    groups: dict[float, list[PlannedTensor]] = {}
    for planned in plan.tensors:
        if planned.factorizer is not None:
            groups.setdefault(matcher.match(planned.spec).ratio, []).append(planned)
    done, total = 0, sum(len(group) for group in groups.values())
    errors: Mapping[str, list[float]] = {}
    if step.allocation == "knapsack":
        assert ids is not None
        errors = _errors(plan, load, ids, scratch, progress, placement)
    shares: dict[str, float] = {}
    for ratio, group in groups.items():
        if step.allocation == "knapsack":  # the head's inputs come after all blocks: it takes its own share
            shares |= {t.name: 1 - ratio for t in group if t.name not in errors}
            group = [t for t in group if t.name in errors]
            if not group:
                continue
        shapes = [(t.spec.shape[0], t.spec.shape[1]) for t in group]
        if step.allocation == "knapsack":
            found = _packed_shares(group, shapes, errors, 1 - ratio)
        else:
            spectra = []
            for planned in group:
                spectra.append(torch.linalg.svdvals(placement.weight(load(planned.name))).tolist())
                done += 1
                progress(done / total)
            try:
                found = pooled_shares(spectra, shapes, 1 - ratio, step.low, step.high)
            except ValueError as error:
                raise PlanError(f"factorize: {error}; move low, high or ratio") from None
        shares |= {t.name: share for t, share in zip(group, found, strict=True)}
    return shares


def _packed_shares(
    group: list[PlannedTensor], shapes: list[tuple[int, int]], errors: Mapping[str, list[float]], share: float
) -> list[float]:
    """Choices of least total error within the budget; the last choice of each matrix is to stay dense."""
    sizes = [
        [_bytes_at(t, shape, s) for s in KNAPSACK_SHARES] + [2 * shape[0] * shape[1]]
        for t, shape in zip(group, shapes, strict=True)
    ]
    budget = int(share * sum(2 * m * n for m, n in shapes))
    try:
        picked = knapsack([[*errors[t.name], 0.0] for t in group], sizes, budget)
    except ValueError as error:
        raise PlanError(f"factorize: {error}; lower the ratio") from None
    return [(*KNAPSACK_SHARES, 1.0)[choice] for choice in picked]


def _bytes_at(planned: PlannedTensor, shape: tuple[int, int], share: float) -> int:
    options = planned.factorizer
    assert options is not None
    sizes = sizes_at(shape, options, share)
    return 2 * shape[0] * shape[1] if sizes is None else factor_bytes(*shape, *sizes, options.sparse)


def _errors(
    plan: Plan,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    progress: Callable[[float], None],
    placement: Placement,
) -> dict[str, list[float]]:
    """Of every factorised tensor of a block, what factors of each of KNAPSACK_SHARES lose of it: relative, squared, in the
    original's own space (ROCKET, arXiv 2602.11008), and under the inputs that the original gives it."""
    out: dict[str, list[float]] = {}
    stream = Stream(plan.spec, load, ids, scratch, "allocation", placement)
    for block in walk(plan.spec, load, placement):
        for branch in block.branches:
            tensors = [t for t in plan.block(block.layer) if t.spec.part == branch.part and t.factorizer is not None]
            weights = block.of(branch)
            site = Site(branch, Streams(stream.at, None), weights, weights)
            for stage in range(branch.sublayer.stages):
                for group in stage_groups(branch, stage, tensors):
                    moments = collect(site, stage, group)
                    site.tokens = site.tokens or counted(branch, stage, moments)
                    for planned in group:
                        statistics = statistics_of(branch, planned, moments)
                        if statistics is not None:
                            out[planned.name] = _losses(planned, weights[planned.name], statistics.gram)
            stream.advance(branch, weights)
        progress((block.layer + 1) / plan.spec.layers)
    stream.at.delete()
    return out


def _losses(planned: PlannedTensor, weight: Tensor, gram: Tensor) -> list[float]:
    options = planned.factorizer
    assert options is not None
    losses = []
    for share in KNAPSACK_SHARES:
        sizes = sizes_at((weight.shape[0], weight.shape[1]), options, share)
        if sizes is None:
            losses.append(float("inf"))
            continue
        left = weight - options.implementation.factorize(weight, gram, *sizes, options).dense()
        losses.append(float(left.square().sum() / weight.square().sum().clamp_min(1e-30)))
    return losses


# -- the structure's file ----------------------------------------------------------------------------------------------
def _state_file(journal: Journal) -> Path:
    return journal.folder / "structure-state.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
    from safetensors.torch import save

    write_synced(
        path, save({name: t.contiguous() for name, t in tensors.items()}, metadata={"facts": json.dumps(facts)})
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        # recovery meets these with autograd
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} is missing or damaged ({error}); start over with --fresh") from None
