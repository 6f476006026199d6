"""The plan for people: what becomes of every kind of tensor, and what it will take."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.codecs.names import codec_info
from compress.containers import CONTAINERS
from compress.report.numbers import human_bytes, human_seconds, percent
from compress.report.verdict import verdict_lines

if TYPE_CHECKING:
    from compress.plan.plan import Plan
    from compress.plan.tensor import PlannedTensor
    from compress.plan.verdict import Verdict
    from compress.run.rehearse import Rehearsal


def plan_table(plan: Plan, estimate: Rehearsal | None = None, verdict: Verdict | None = None) -> RenderableType:
    """Header, one row per role, codec and solver, totals, warnings, the verdict; fits 100 columns."""
    parts: list[RenderableType] = [_header(plan), _role_table(plan), "", _totals(plan, estimate)]
    if plan.savings:
        parts += ["", _savings_table(plan)]
    counts: Counter[tuple[str, str, str]] = Counter()
    for t, count in plan.counted:
        if t.wanted is not None:
            why = "in pieces" if t.taken_apart else f"rows of {t.spec.shape[-1]}"
            counts[t.spec.role, f"{t.wanted} -> {t.codec}", why] += count
    if counts:
        parts += ["", Text(f"Fallbacks: {counts.total()} tensors that the recipe's codec cannot hold")]
        parts += [Text(f"  {role}: {change} ({count} tensors, {why})") for (role, change, why), count in counts.items()]
    if plan.warnings:
        parts += ["", *(Text(f"Note: {warning}") for warning in plan.warnings)]
    if verdict is not None:
        parts += ["", verdict_lines(verdict, plan.recipe.model)]
    return Group(*parts)


def _header(plan: Plan) -> Text:
    spec = plan.spec
    facts = [f"{spec.layers} layers", f"hidden {spec.hidden_size:,}"]
    if spec.experts:
        facts.append(f"{spec.experts} experts, {spec.experts_per_token} a token")
        if len(spec.sparse_layers) < spec.layers:
            facts.append(f"in {len(spec.sparse_layers)} layers")
    return Text.assemble(
        (plan.recipe.model, "bold"),
        "  ·  recipe ",
        (plan.recipe.name, "bold"),
        f"\n{spec.family.hf_architecture} ({spec.model_type}), {', '.join(facts)}",
    )


def _role_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("role", "codec", "solver"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tensors", "parameters", "bytes", "bits a weight", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str], list[int]] = {}
    for t, count in plan.counted:
        row = rows.setdefault((t.spec.role, _codec(t), t.label or "–"), [0, 0, 0])
        row[0] += count
        row[1] += count * t.spec.parameters
        row[2] += count * t.bytes
    for (role, codec, solver), (count, parameters, size) in rows.items():
        table.add_row(
            role,
            codec,
            solver,
            f"{count:,}",
            f"{parameters:,}",
            human_bytes(size),
            f"{8 * size / parameters:.2f}",
            f"{100 * size / plan.bytes:.1f}%",
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        "",
        f"{sum(count for _, count in plan.counted):,}",
        f"{plan.parameters:,}",
        human_bytes(plan.bytes),
        f"{8 * plan.bytes / plan.parameters:.2f}",
        "100%",
        style="bold",
    )
    return table


def _codec(planned: PlannedTensor) -> str:
    """`int8-row a8` where inputs are rounded to 8 bits, `int2-g128 had` between Hadamard transforms, `bf16 x sparse-bf16`
    for a dictionary and its coefficients."""
    if planned.factors is not None:
        return " x ".join(codec_info(planned.codec).parts)
    turned = planned.incoherence and not codec_info(planned.codec).incoherent  # those never are anything else
    return planned.codec + (" had" if turned else "") + (" a8" if planned.activations else "")


def _savings_table(plan: Plan) -> Table:
    """One line a step and container: bytes of the weights it works on, before and after."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("saves", "in", "on disk", "at run time"):
        table.add_column(heading, no_wrap=True)
    table.add_column("how", overflow="fold")
    for line in plan.savings:
        disk = f"{human_bytes(line.before)} -> {human_bytes(line.after)}"
        table.add_row(
            line.step,
            line.container,
            "nothing" if line.nothing else disk,
            "nothing" if line.nothing else human_bytes(line.memory),
            f"{line.engine}: {line.note}",
        )
    return table


def _totals(plan: Plan, estimate: Rehearsal | None) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    original = (
        f"{human_bytes(plan.source_bytes)} at {8 * plan.source_bytes / plan.original_parameters:.2f} bits a weight"
    )
    table.add_row("original", original)
    table.add_row(
        "compressed",
        Text(
            f"{human_bytes(plan.bytes)} at {plan.bits_per_weight:.2f} bits a weight"
            f"{' of the original' if plan.structural else ''}",
            style="bold",
        ),
    )
    table.add_row("steps", ", ".join(step.kind for step in plan.recipe.steps) or "none: a conversion")
    for export in plan.recipe.export:
        container = CONTAINERS[export.container]
        size = plan.artifact_bytes[container.name]
        share = size / plan.source_bytes
        told = f"{human_bytes(size)}, {percent(share)} of the original (1/{1 / share:.1f})"
        where = f", in {plan.recipe.output}; runs in {container.engines}"
        table.add_row("artifact", Text.assemble(f"{container.name}, ", (told, "bold"), where))
    if plan.needs_calibration:
        c = plan.recipe.calibration
        table.add_row("calibration", f"{c.samples * c.length:,} tokens ({c.samples} x {c.length}) of {c.dataset}")
    else:
        table.add_row("calibration", "none needed")
    if plan.open:
        what = {
            "structure": "which layers, experts, heads and channels go",
            "sparsity": "how sparse each layer becomes",
            "factors": "how large each matrix's factors are (shown: the same share for all)",
        }
        table.add_row(
            "decided by", f"a survey of the model: {'; '.join(what[o] for o in plan.open)}; the sum is as shown"
        )
    table.add_row("peak memory", f"about {human_bytes(plan.peak_memory_bytes)}, whatever the number of layers")
    table.add_row("disk", f"about {human_bytes(plan.disk_bytes)} while it runs")
    if estimate is not None:
        parts = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in estimate.parts.items())
        table.add_row("time", Text.assemble((f"about {human_seconds(estimate.total)}", "bold"), f" ({parts})"))
    return table
