"""compress advise: which recipe for this model on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.cli.app import show
from compress.cli.options import JsonOption


def advise(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub id or bundled model.")],
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Main memory it may take, as 8GB; by default what is free here."),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram", metavar="SIZE", help="GPU memory it may take, as 8GB, or 0; by default what is free here."
        ),
    ] = None,
    use: Annotated[
        str, typer.Option("--use", metavar="USE", help="chat, code or long: how much context is wanted.")
    ] = "chat",
    as_json: JsonOption = False,
) -> None:
    """Propose recipes for a model on this machine: what fits, how close it stays, how to run it; reads no weights."""
    from compress.advise import Wish
    from compress.advise import advise as find
    from compress.advise.rules import rules
    from compress.machine import look

    if use not in rules().uses:
        raise typer.BadParameter(f"expected one of {', '.join(rules().uses)}, got {use}", param_hint="--use")
    here = look()
    given = here.given(_bytes(memory, "--memory"), _bytes(vram, "--vram"))
    advice = find(Wish(model, given, use, here))
    if as_json:
        typer.echo(json.dumps(advice.as_dict()))
        return
    from compress.report.advise_table import advise_table

    show(advise_table(advice))


def _bytes(text: str | None, name: str) -> int | None:
    from compress.recipe.schema import byte_count

    if text is None or text.strip() == "0":
        return None if text is None else 0
    if (count := byte_count(text)) is None:
        raise typer.BadParameter(f"expected a size like 8GB or 512MiB, got {text}", param_hint=name)
    return count
