"""compress reproduce: the same bytes again?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compress.cli.app import load_plugins
from compress.cli.options import (
    DeviceOption,
    JsonOption,
    PluginOption,
    QuietOption,
    SetOption,
)
from compress.errors import GateFailed


def reproduce(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A reproduce.json, the folder of a run, or a hub id (owner/name@revision)."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Where the original lies, if only its name is known."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FOLDER", help="A new folder; by default out/NAME-reproduced."),
    ] = None,
    set: SetOption = None,
    plugin: PluginOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Carry a run out again from its reproduce.json and compare every file; what differs ends with exit code 3."""
    from compress.report.progress import Reporter

    load_plugins(plugin)
    reporter = Reporter(0 if quiet else 1)
    with reporter.stage("start"):  # torch takes seconds to import
        from compress.run.reproduce import SAME, Here
        from compress.run.reproduce import reproduce as carry_out
    found = carry_out(target, Here(model, tuple(set or ()), output, device), reporter)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        for name, status in found.files.items():
            if not quiet or status != SAME:
                typer.echo(f"{status:<10} {name}")
    if not found.other:
        if quiet and not as_json:
            typer.echo(found.folder)
        return
    why = "; ".join(found.changes) or "nothing that is known to decide bytes differs here from the first time"
    raise GateFailed(
        f"{len(found.other)} of {len(found.files)} files are not the same bytes; {why}; what was made is in {found.folder}"
    )
