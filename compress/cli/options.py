"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated

import typer


def _recipes(incomplete: str) -> list[str]:
    """Bundled recipes, for completion."""
    from compress.recipe.load import bundled_recipes

    return [name for name in bundled_recipes() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, a bundled recipe, or a type: Q4_K_M, W4A16, EXPERTS_2BIT, gptq, ...",
        autocompletion=_recipes,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Folder, GGUF file or hub id, instead of the recipe's model."),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="FOLDER", help="Output folder, instead of the recipe's.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="What scores compare with: of a quantized model the original that it was made from.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="A LoRA adapter that peft saved, merged into the model."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A value of the recipe, by its key or the last parts of it, as scheme=Q5_K_M; repeatable.",
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="A Python file that adds codecs, methods, containers or families; its code runs. Repeatable.",
    ),
]


def _device(name: str | None) -> str | None:
    if name is not None and re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name) is None:
        raise typer.BadParameter(f"no such device: {name}; use auto, cpu, cuda, cuda:N or mps")
    return name


DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        callback=_device,
        help="auto, cpu, cuda, cuda:N or mps; by default $COMPRESS_DEVICE, else the CPU.",
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="Stop at what speaks against the original instead of noting it."),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over, whatever the output folder holds.")]
KeepWorkOption = Annotated[bool, typer.Option("--keep-work", help="Keep the work folder after success.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the path of what was made.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print what every stage does.")]
