"""compress ladder: one model in several types, from one pass over the calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.app import load_plugins, show
from compress.cli.options import (
    AdapterOption,
    BaseOption,
    DeviceOption,
    FreshOption,
    JsonOption,
    KeepWorkOption,
    OutputOption,
    PluginOption,
    QuietOption,
    SetOption,
    StrictOption,
    VerboseOption,
)

if TYPE_CHECKING:
    from compress.recipe.ladder import Ladder


def ladder(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, GGUF file or hub id of the original.")],
    types: Annotated[
        str | None,
        typer.Option("--types", metavar="TYPE,TYPE,...", help="Which; by default eight from Q8_0 to IQ2_M."),
    ] = None,
    output: OutputOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    set: SetOption = None,
    plugin: PluginOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes and fallbacks; make nothing.")] = False,
    fresh: FreshOption = False,
    keep_work: KeepWorkOption = False,
    device: DeviceOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make several types of one model at once: one calibration, one importance matrix, one scorecard and card."""
    from compress.recipe.ladder import USUAL, load_ladder

    load_plugins(plugin)
    wanted = USUAL if types is None else tuple(name.strip() for name in types.split(","))
    loaded = load_ladder(wanted, set or (), model=model, output=output, base=base, adapter=adapter)
    if dry_run:
        _show_sizes(loaded, as_json)
        return
    from compress.report.progress import Reporter

    reporter = Reporter(0 if quiet else 2 if verbose else 1)
    reporter.say(f"model {model}, types {', '.join(map(str, loaded.recipes))}, output {loaded.output}")
    with reporter.stage("start"):  # torch takes seconds to import
        from compress.report.advice import advise
        from compress.report.compare import Run, compare
        from compress.report.compare_table import CompareTable
        from compress.run.loop import run_ladder
    card = run_ladder(loaded, fresh=fresh, keep_work=keep_work, reporter=reporter, device=device, strict=strict)
    if as_json:
        typer.echo(json.dumps({"folder": loaded.output, **json.loads(card.to_json())}))
        return
    if not quiet:
        comparison = compare([Run(card)])
        show(CompareTable(comparison, advise(comparison)))
    for name in (*(artifact.path for artifact in card.artifacts), *card.beside):
        typer.echo(str(Path(loaded.output) / name))


def _show_sizes(ladder: Ladder, as_json: bool) -> None:
    """What would be made."""
    from compress.plan.make import make_plan
    from compress.report.ladder_table import ladder_rows, ladder_table

    plans = {str(kind): make_plan(recipe) for kind, recipe in ladder.recipes.items()}
    if as_json:
        typer.echo(json.dumps(ladder_rows(plans)))
    else:
        show(ladder_table(plans))
