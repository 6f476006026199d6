"""compress generate: let a model speak."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.errors import CompressError


def generate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=1, metavar="N", help="At most this many new tokens.")
    ] = 64,
) -> None:
    """Let llama.cpp continue a prompt with a GGUF file, greedily."""
    if not prompt:
        raise CompressError("the prompt is empty; give some text to continue")
    from compress.engines.llama_cpp import LlamaCpp

    with LlamaCpp(file) as model:
        typer.echo(prompt + model.generate(prompt, tokens))
