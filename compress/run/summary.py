"""The scorecard of a finished run: what the journal and the delivery say, and every fallback as a line of its own."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from compress.export.deliver import Delivery
from compress.plan.plan import Plan
from compress.report.progress import Reporter
from compress.report.provenance import versions
from compress.report.scorecard import Base, Experts, Gate, LayerError, Scorecard
from compress.run.claim import TEXT, run_digest
from compress.run.inspect import INSPECTED
from compress.run.recover import RECOVERED
from compress.run.surveys import STRUCTURE
from compress.scoring.results import Fallback
from compress.structured.shapes import widths_of

CHANNELS = {
    "intermediate": "feed-forward channels",
    "moe_intermediate": "channels of an expert",
    "shared_intermediate": "channels of the shared expert",
}

MORE_TEXT = "--set calibration.samples={}"  # what makes fewer experts cold and grams better conditioned


class Reports(Protocol):
    """What a journal says of the units of one plan."""

    @property
    def units(self) -> Mapping[str, Any]: ...
    @property
    def digest(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    def __contains__(self, unit: str) -> bool: ...


def structure_notes(plan: Plan, journal: Reports) -> tuple[str, ...]:
    """What went of a model that changed its shape, and what the repair was worth."""
    if STRUCTURE not in journal:
        return ()
    report, whole, left, notes = journal.units[STRUCTURE]["structure"], plan.turned, plan.spec, []
    if report["dropped_layers"]:
        gone = ", ".join(f"{n} (influence {report['influence'][n]:.3f})" for n in report["dropped_layers"])
        notes.append(f"layers of the original that were dropped: {gone}")
    if left.experts < whole.experts:
        each = "; ".join(
            f"layer {entry['layer']}: {', '.join(str(e) for e in range(whole.experts) if e not in entry['experts'])}"
            for entry in report["layers"]
            if "experts" in entry
        )
        notes.append(f"experts of the original that went: {each}")
    if plan.recipe.step("prune_structured") is not None:
        sizes = [("key-value heads", whole.kv_heads, left.kv_heads)]
        sizes += [(CHANNELS[field], width, widths_of(left)[field]) for field, width in widths_of(whole).items()]
        kept = [f"{what} {before:,} -> {after:,}" for what, before, after in sizes if before != after]
        notes.append(f"every layer keeps: {', '.join(kept)}")
    return tuple(notes)


def make_scorecard(
    plan: Plan, journal: Reports, results: Delivery, reporter: Reporter, machine: Mapping[str, Any]
) -> Scorecard:
    """What `scorecard.json` says about a run whose artifacts are written. machine: where it computed, of `provenance.machine`."""
    solved = [s for report in journal.units.values() for s in report.get("solved", ())]
    experts = _experts(plan, journal, solved)
    fallbacks = [
        *_of_codecs(plan),
        *_of_damping(plan, solved),
        *_of_recovery(plan, journal),
        *_of_factors(plan),
        *(line for layer in experts for line in _of_cold_experts(layer, plan.recipe.calibration.samples)),
        *results.fallbacks,
    ]
    compared = plan.compared
    base = Base(
        model=None if plan.base is None else plan.base.name,
        bytes=compared.bytes,
        weight_bytes=compared.weight_bytes,
        bits_per_weight=8 * compared.weight_bytes / compared.spec.parameters,
        parameters=compared.spec.parameters,
        scores=results.base_scores,
        tasks=results.base_tasks,
        texts=results.base_texts,
        speed=results.base_speed,
    )
    return Scorecard(
        model=plan.identity.version,
        recipe=plan.recipe.name,
        artifacts=tuple(results.artifacts),
        base=base,
        experts=tuple(_rounded(layer) for layer in experts),
        fallbacks=tuple(fallbacks),
        gate=Gate(passed=results.passed, checks=tuple(results.checks)),
        stages=reporter.all_stages,
        recipe_digest=plan.recipe.digest(),
        run_digest=run_digest(journal.digest, journal.inputs.get(TEXT), plan.recipe),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        calibration=_text_read(plan),
        versions=versions(),
        machine=dict(machine),
        notes=(*plan.warnings, *journal.units[INSPECTED]["doubts"], *results.doubts, *structure_notes(plan, journal)),
        errors=tuple(layer_errors(plan, solved)),
        suite=None if plan.recipe.score is None else Path(plan.recipe.score.suite).stem,
        loader=plan.spec.loader,
    )


def _text_read(plan: Plan) -> dict[str, Any]:
    """What the recipe says of its calibration text; of a mix, dataset is its name for people."""
    text = plan.recipe.calibration
    return {**text.portable(), "dataset": text.source.label} if plan.needs_calibration else {}


def layer_errors(plan: Plan, solved: Sequence[Mapping[str, Any]]) -> Iterator[LayerError]:
    """What solving lost, per layer and role in the order of the plan. A sum of squares over a sum of squares: tensors count by
    their output, experts that few tokens reached hardly at all; alike where there is no output whatever."""
    groups: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
    order = {t.name: number for number, t in enumerate(plan.tensors)}
    for s in sorted(solved, key=lambda s: order[s["name"]]):
        spec = plan.by_name[s["name"]].spec
        groups.setdefault((spec.layer, spec.role), []).append(s)
    for (layer, role), members in groups.items():
        energies = [s["energy"] for s in members]
        weights = energies if sum(energies) > 0 else [1.0] * len(members)
        error = sum(w * s["error"] for w, s in zip(weights, members, strict=True)) / sum(weights)
        sizes: dict[str, int] = {}
        for s in members:
            sizes[s["codec"]] = sizes.get(s["codec"], 0) + plan.by_name[s["name"]].spec.parameters
        codec = max(sizes, key=lambda name: sizes[name])
        yield LayerError(
            layer=layer, role=role, codec=codec, error=float(f"{error:.6g}"), parameters=sum(sizes.values())
        )


def _of_codecs(plan: Plan) -> Iterator[Fallback]:
    """Tensors in another codec than the recipe's."""
    cures = {(found.role, found.wanted): found.cure for found in plan.exchanges}
    for t in plan.fallbacks:
        wanted = t.wanted or ""
        cure = cures.get((t.spec.role, wanted), "")
        yield Fallback(subject=t.name, wanted=wanted, used=t.codec, reason=t.why, role=t.spec.role, cure=cure)


def _of_damping(plan: Plan, solved: Sequence[Mapping[str, Any]]) -> Iterator[Fallback]:
    """Grams that took more damping than the recipe gives."""
    for s in solved:
        if s["retries"]:
            yield Fallback(
                subject=s["name"],
                wanted=f"damping {plan.by_name[s['name']].asks.damping:g}",
                used=f"damping {s['damping']:g}",
                reason=f"gram not positive definite, {s['retries']} retries",
                role=plan.by_name[s["name"]].spec.role,
                cure=MORE_TEXT.format(2 * plan.recipe.calibration.samples),
            )


def _of_recovery(plan: Plan, journal: Reports) -> Iterator[Fallback]:
    """Blocks that recovery left as they were, and the model where that is true of the last stage."""
    for layer in range(plan.spec.layers):
        recovered = journal.units[f"block-{layer:05d}"].get("recovered")
        if recovered and not recovered["kept"]:
            yield Fallback(
                subject=f"block {layer}",
                wanted="recovery",
                used="the block as it was solved",
                reason=recovered.get("reason", ""),
                role="blocks",
            )
    if RECOVERED in journal and not (whole := journal.units[RECOVERED]["recovered"])["kept"]:
        yield Fallback(
            subject="all blocks together",
            wanted="end-to-end recovery",
            used="the blocks as they were recovered one by one",
            reason=whole["reason"],
        )


def _of_factors(plan: Plan) -> Iterator[Fallback]:
    """Tensors that no factors of their size make smaller."""
    for t in plan.tensors:
        if t.unfactored:
            yield Fallback(
                subject=t.name,
                wanted="factors",
                used=f"dense {t.codec}",
                reason="its share of the budget is the whole matrix, or no factors of its size are smaller",
                role=t.spec.role,
            )


def _of_cold_experts(layer: Experts, samples: int) -> Iterator[Fallback]:
    """Experts whose statistics are mostly their pool's. samples: windows of calibration text."""
    for e in layer.cold:
        yield Fallback(
            subject=f"block {layer.layer} expert {e}",
            wanted="own statistics",
            used=f"{layer.borrowed[e]:.0%} of the block's pool",
            reason=f"{layer.tokens[e]} calibration tokens reached it",
            role="cold experts",
            cure=MORE_TEXT.format(2 * samples),
        )


def _experts(plan: Plan, journal: Reports, solved: Sequence[Mapping[str, Any]]) -> list[Experts]:
    """What the calibration text was to the experts of every layer that has some; shares borrowed unrounded."""
    experts = []
    for layer in range(plan.spec.layers):
        tokens = journal.units[f"block-{layer:05d}"].get("tokens") or ()
        if not tokens:
            continue
        borrowed = [0.0] * len(tokens)
        for s in solved:
            tensor = plan.by_name[s["name"]].spec
            if tensor.layer == layer and tensor.expert is not None:
                borrowed[tensor.expert] = max(borrowed[tensor.expert], s["borrowed"])
        cold = tuple(e for e, share in enumerate(borrowed) if share > 0.5)
        experts.append(Experts(layer=layer, tokens=tuple(tokens), cold=cold, borrowed=tuple(borrowed)))
    return experts


def _rounded(layer: Experts) -> Experts:
    return layer.model_copy(update={"borrowed": tuple(round(share, 4) for share in layer.borrowed)})
