"""`compress methods`: what a recipe can be made of, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Group, RenderableType

from compress import catalog as methods
from compress.containers import CONTAINERS
from compress.recipe.load import About
from compress.recipe.schemes import SCHEMES
from compress.report.layout import Facts, Grid, Head, Line, Prose

NAMES = 17  # columns that a list of codecs may be folded to


def recipes_table(recipes: Sequence[About]) -> RenderableType:
    """Each bundled recipe, what it writes, and when to choose it; for any width."""
    lines = [Line((recipe.name, ", ".join(recipe.containers), recipe.when), section=True) for recipe in recipes]
    heads = (
        Head("recipe", right=False),
        Head("writes", right=False, folds=12),
        Head("when to choose it", right=False, folds=24),
    )
    other = "A scheme, codec or container that `compress methods` lists is a recipe, too: compress run Q4_K_M --model M"
    return Group(Grid(heads, lines), Prose(other))


def methods_table() -> RenderableType:
    """Steps, their solvers, codecs by size, containers with their engines; for any width."""
    parts: list[RenderableType] = []
    for title, rows in (
        ("steps beside quantize", methods.steps()),
        ("solvers of quantize", methods.solvers()),
        ("solvers of prune", methods.pruners()),
        ("solvers of factorize", methods.factorizers()),
    ):
        parts += [_table(title, ((row.name, row.about) for row in rows)), ""]
    codecs = [
        Line((", ".join(c.name for c in group), bits, containers))
        for (bits, containers), group in groupby(
            methods.codecs(), key=lambda c: (f"{c.bits_per_weight:.2f}", ", ".join(c.containers))
        )
    ]
    heads = (
        Head("codecs", right=False, folds=NAMES),
        Head("bits per weight"),
        Head("containers", right=False, folds=NAMES),
    )
    engines = ((container.name, container.engines) for container in CONTAINERS.values())
    schemes = Facts((("schemes", ", ".join(SCHEMES)),))
    return Group(*parts, Grid(heads, codecs), "", _table("containers", engines, "engines"), "", schemes)


def families_table() -> RenderableType:
    """Families of models with what works on each, then what each of the others is refused for; for any width."""
    found = methods.families()
    lines = [
        Line((line.name, ", ".join(line.model_types), ", ".join(line.archs) or "–", _working(line)), section=True)
        for line in found
    ]
    heads = (
        Head("family", right=False, folds=16),
        Head("model_type", right=False, folds=16),
        Head("llama.cpp", right=False, folds=9),
        Head("steps that change the model", right=False, folds=20),
    )
    folders = [name for name, container in CONTAINERS.items() if not container.suffix]
    told = (
        "Calibration, quantize, prune, factorize, awq, smooth and recover work on all of them, and so do the containers "
        f"{', '.join(folders)} and gguf, but for what is told here. The reasons: compress methods --families --json"
    )
    limits = [
        Prose(f"{line.name}: {container}: {why}", indent=2)
        for line in found
        for container, why in line.containers.items()
        if why
    ]
    return Group(Grid(heads, lines), "", Prose(told), *limits)


def _working(line: methods.FamilyLine) -> str:
    return ", ".join(step for step, why in line.steps.items() if not why) or "–"


def _table(title: str, rows: Iterable[tuple[str, str]], what: str = "what it does") -> Grid:
    return Grid((Head(title, right=False), Head(what, right=False, folds=20)), [Line(row) for row in rows])
