"""The plan for people: what becomes of every kind of tensor, and what it will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from compress.codecs.names import codec_info
from compress.containers import CONTAINERS, Container
from compress.plan.causes import count_of
from compress.plan.tensor import codes_container
from compress.report.layout import Facts, Grid, Head, Line, Prose
from compress.report.numbers import bits, human_bytes, human_seconds, percent
from compress.report.verdict import verdict_lines

if TYPE_CHECKING:
    from compress.plan.plan import Plan
    from compress.plan.tensor import PlannedTensor
    from compress.plan.verdict import Verdict
    from compress.run.rehearse import Rehearsal


def plan_table(plan: Plan, estimate: Rehearsal | None = None, verdict: Verdict | None = None) -> RenderableType:
    """Header, one row per role, codec and solver, totals, what is stored otherwise, notes, the verdict; for any width."""
    parts: list[RenderableType] = [*_header(plan), role_table(plan), "", totals(plan, estimate)]
    if plan.savings:
        parts += ["", *saving_lines(plan)]
    if plan.exchanges:
        parts += ["", *_exchange_lines(plan)]
    if plan.warnings:
        parts += ["", *(Prose(f"Note: {warning}") for warning in plan.warnings)]
    if verdict is not None:
        parts += ["", verdict_lines(verdict, plan.recipe.model)]
    return Group(*parts)


def _header(plan: Plan) -> tuple[RenderableType, ...]:
    spec = plan.spec
    facts = [f"{spec.layers} layers", f"hidden {spec.hidden_size:,}"]
    if spec.experts:
        facts.append(f"{spec.experts} experts, {spec.experts_per_token} a token")
        if len(spec.sparse_layers) < spec.layers:
            facts.append(f"in {len(spec.sparse_layers)} layers")
    title = Text.assemble((plan.recipe.model, "bold"), "  ·  recipe ", (plan.recipe.name, "bold"))
    return Prose(title), Prose(f"{spec.architecture} ({spec.model_type}), {', '.join(facts)}")


def _exchange_lines(plan: Plan) -> Iterator[RenderableType]:
    """Once a role, then what cures it, once for all that it cures."""
    total = sum(exchange.tensors for exchange in plan.exchanges)
    yield Prose(f"Fallbacks: {count_of(total)} that the recipe's codec cannot hold", indent=0)
    for exchange in plan.exchanges:
        yield Prose(f"  {exchange}", indent=4)
    if cures := dict.fromkeys(exchange.cure for exchange in plan.exchanges if exchange.cure):
        yield Prose(f"  avoided by {' '.join(cures)}", indent=4)


def role_table(plan: Plan) -> Grid:
    """A line per role, codec and solver, then one of all."""
    rows: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for t, count in plan.counted:
        key = (t.spec.role, _codec(t), t.label or "–")
        tensors, parameters, size = rows.get(key, (0, 0, 0))
        rows[key] = (tensors + count, parameters + count * t.spec.parameters, size + count * t.bytes)
    whole = plan.bytes + plan.beside_tensors

    def line(names: tuple[str, str, str], count: int, parameters: int, size: int, style: str = "") -> Line:
        each = f"{8 * size / parameters:.2f}" if parameters else ""
        share = f"{100 * size / whole:.1f}%"
        numbers = (f"{count:,}" if count else "", f"{parameters:,}" if parameters else "")
        return Line((*names, *numbers, human_bytes(size), each, share), style)

    lines = [line(names, *numbers) for names, numbers in rows.items()]
    container = codes_container(plan.recipe.containers)
    beside = "names, tokenizer" if container.copied_bytes(plan.source) else "names"
    lines.append(replace(line((beside, "", ""), 0, 0, plan.beside_tensors), section=True))
    count = sum(count for _, count in plan.counted)
    lines.append(line(("all", "", ""), count, plan.parameters, whole, "bold"))
    heads = (
        *(Head(heading, right=False) for heading in ("role", "codec", "solver")),
        Head("tensors", spare=2),
        Head("parameters", spare=3),
        Head("size"),
        Head("bits per weight left" if plan.structural else "bits per weight"),
        Head("of all", spare=1),
    )
    return Grid(heads, lines)


def _codec(planned: PlannedTensor) -> str:
    """`int8-row a8` where inputs are rounded to 8 bits, `int2-g128 had` between Hadamard transforms, `bf16 x sparse-bf16`
    for a dictionary and its coefficients."""
    if planned.factors is not None:
        return " x ".join(codec_info(planned.codec).parts)
    turned = planned.incoherence and not codec_info(planned.codec).incoherent  # those never are anything else
    return planned.codec + (" had" if turned else "") + (" a8" if planned.activations else "")


def saving_lines(plan: Plan) -> Iterator[Prose]:
    """One a step and container: bytes of the weights it works on, before and after."""
    for saving in plan.savings:
        disk = f"{human_bytes(saving.before)} -> {human_bytes(saving.after)} on disk"
        told = "nothing" if saving.nothing else f"{disk}, {human_bytes(saving.memory)} at run time"
        yield Prose(f"{saving.step} saves in {saving.container}: {told}; {saving.engine}: {saving.note}")


def totals(plan: Plan, estimate: Rehearsal | None = None) -> Facts:
    """What it will make and take."""
    told: list[tuple[str, str | Text]] = [
        (
            "original",
            f"{human_bytes(plan.original_bytes)}, {bits(8 * plan.source_bytes / plan.original_parameters)} bits per weight",
        )
    ]
    told.append(("steps", ", ".join(step.kind for step in plan.recipe.steps) or "none: a conversion"))
    for export in plan.recipe.export:
        told.append(("artifact", _artifact(plan, CONTAINERS[export.container])))
    told.append(("output", plan.recipe.output))
    if plan.needs_calibration:
        c = plan.recipe.calibration
        told.append(("calibration", f"{c.samples * c.length:,} tokens ({c.samples} x {c.length}) of {c.source.label}"))
    else:
        told.append(("calibration", "none needed"))
    if plan.open:
        what = {
            "structure": "which layers, experts, heads and channels go",
            "sparsity": "how sparse each layer becomes",
            "factors": "how large each matrix's factors are (shown: the same share for all)",
        }
        surveyed = "; ".join(what[o] for o in plan.open)
        told.append(("decided by", f"a survey of the model: {surveyed}; the sum is as shown"))
    told.append(("peak memory", f"about {human_bytes(plan.peak_memory_bytes)}, whatever the number of layers"))
    told.append(("disk", f"about {human_bytes(plan.disk_bytes)} while it runs"))
    if estimate is not None:
        parts = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in estimate.parts.items())
        told.append(("time", Text.assemble((f"about {human_seconds(estimate.total)}", "bold"), f" ({parts})")))
    return Facts(tuple(told))


def _artifact(plan: Plan, container: Container) -> Text:
    """Size, bits per weight and share of the original as a scorecard will have them."""
    size = plan.artifact_bytes[container.name]
    share = size / plan.original_bytes
    figures = (
        f"{human_bytes(size)}, {bits(8 * plan.file_bytes[container.name] / plan.weights_in(container))} bits per weight, "
        f"{percent(share)} of the original (1/{1 / share:.1f})"
    )
    return Text.assemble(f"{container.name}, ", (figures, "bold"), f"; runs in {container.engines}")
