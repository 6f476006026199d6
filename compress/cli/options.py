"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, a bundled recipe, or a type: Q4_K_M, W4A16, EXPERTS_2BIT, gptq, ...")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder, GGUF file or hub id, instead of the recipe's model.")
]
OutputOption = Annotated[str | None, typer.Option("--output", help="Output folder, instead of the recipe's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="key=value of the recipe, in full or its last parts: calibration.samples=64, scheme=Q5_K_M; repeatable.",
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", help="A Python file that adds codecs, methods, containers or families; its code runs. Repeatable."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps; by default COMPRESS_DEVICE, else the CPU."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at what speaks against the original instead of noting it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the path of what was made.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print what every stage does.")]
