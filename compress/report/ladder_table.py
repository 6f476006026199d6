"""What a ladder will make, before anything is done: a line a type, with its size and how much of it gets another codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from compress.report.layout import Grid, Head, Line, Prose
from compress.report.numbers import bits, human_bytes, percent

if TYPE_CHECKING:
    from compress.plan.plan import Plan


def ladder_rows(plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """For programs: type, file, bytes of all its files, bits stored for every weight of the original, and the share of weights
    in another codec than the type's."""
    return [_row(kind, plan) for kind, plan in plans.items()]


def _row(kind: str, plan: Plan) -> dict[str, Any]:
    container = plan.recipe.containers[0]
    replaced = sum(count * t.spec.parameters for t, count in plan.counted if t.wanted is not None)
    return {
        "type": kind,
        "file": plan.artifact_name(container, plan.recipe.export[0].name),
        "bytes": plan.artifact_bytes[container.name],
        "bits_per_weight": 8 * plan.file_bytes[container.name] / plan.weights_in(container),
        "share_in_other_codecs": replaced / plan.parameters,
    }


def ladder_table(plans: Mapping[str, Plan]) -> RenderableType:
    """The same for people."""
    first = next(iter(plans.values()))
    rows = ladder_rows(plans)
    heads = (Head("type", right=False), Head("size"), Head("bits"), Head("other codecs"), Head("file", right=False))
    lines = [
        Line(
            (
                row["type"],
                human_bytes(row["bytes"]),
                bits(row["bits_per_weight"]),
                percent(row["share_in_other_codecs"]) if row["share_in_other_codecs"] else "none",
                row["file"],
            )
        )
        for row in rows
    ]
    told = f"{first.identity.version}, {human_bytes(first.original_bytes)}: {len(rows)} types, "
    total = human_bytes(sum(row["bytes"] for row in rows))
    parts: list[RenderableType] = [Prose(f"{told}{total} together", "bold"), "", Grid(heads, lines)]
    if any(row["share_in_other_codecs"] for row in rows):
        why = "other codecs: the share of weights whose rows do not divide into the type's blocks"
        parts += ["", Prose(f"{why}; compress plan TYPE --model MODEL says which, and what stands in")]
    return Group(*parts)
