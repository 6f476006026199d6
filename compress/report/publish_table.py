"""`compress publish --dry-run`: what would go where, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType

from compress.report.layout import Facts, Grid, Head, Line, Prose
from compress.report.numbers import human_bytes


def publish_table(facts: Mapping[str, str], files: Mapping[str, int], front_matter: str) -> RenderableType:
    """What would be published; for any width. facts: of the repository, by name; files: bytes by name there; front_matter: of
    its card, "" where there is none."""
    told = {**facts, "files": f"{len(files)}, {human_bytes(sum(files.values()))} in all"}
    lines = [Line((name, human_bytes(size))) for name, size in files.items()]
    top = [Prose(line) for line in front_matter.splitlines()] or [Prose("(no card, or a card without front matter)")]
    return Group(
        Facts(tuple(told.items())),
        "",
        Grid((Head("file", right=False, folds=24), Head("size")), lines),
        "",
        Prose("The card begins", style="bold"),
        *top,
        "",
        Prose("Nothing was sent; without --dry-run the same command publishes"),
    )
