"""`compress methods`: what a recipe can be made of, for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress import catalog as methods
from compress.containers import CONTAINERS
from compress.recipe.load import About
from compress.recipe.schemes import SCHEMES


def recipes_table(recipes: Sequence[About]) -> RenderableType:
    """Each bundled recipe, what it writes, and when to choose it."""
    table = _table("recipe", "writes", "when to choose it")
    for recipe in recipes:
        table.add_row(recipe.name, ", ".join(recipe.containers), f"{recipe.when}\n")
    other = "A scheme, codec or container that `compress methods` lists is a recipe, too: compress run Q4_K_M --model M"
    return Group(table, Text(other))


def methods_table() -> RenderableType:
    """Steps, their solvers, codecs by size, containers with their engines."""
    parts: list[RenderableType] = []
    for title, rows in (
        ("steps beside quantize", methods.steps()),
        ("solvers of quantize", methods.solvers()),
        ("solvers of prune", methods.pruners()),
        ("solvers of factorize", methods.factorizers()),
    ):
        table = _table(title, "what it does")
        for row in rows:
            table.add_row(row.name, row.about)
        parts += [table, ""]
    codecs = _table("codecs", "bits a weight", "containers")
    for (bits, containers), group in groupby(
        methods.codecs(), key=lambda c: (f"{c.bits_per_weight:.2f}", ", ".join(c.containers))
    ):
        codecs.add_row(", ".join(c.name for c in group), bits, containers)
    engines = _table("containers", "engines")
    for container in CONTAINERS.values():
        engines.add_row(container.name, container.engines)
    schemes = Text.assemble(("schemes  ", "bold"), ", ".join(SCHEMES))
    return Group(*parts, codecs, "", engines, "", schemes)


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "bits a weight" else "left", overflow="fold")
    return table
