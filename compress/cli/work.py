"""compress plan, compress run: what a recipe will do, and doing it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.app import load_plugins, show
from compress.cli.options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    OutputOption,
    PluginOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    StrictOption,
    VerboseOption,
)


def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    set: SetOption = None,
    plugin: PluginOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, whatever the output folder holds.")] = False,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the work folder after success.")] = False,
    device: DeviceOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Carry out a recipe: calibrate, quantize, export, check, score."""
    from compress.recipe import load_recipe

    load_plugins(plugin)
    loaded = load_recipe(recipe, set or (), model=model, output=output)
    from compress.report.progress import Reporter

    reporter = Reporter(0 if quiet else 2 if verbose else 1)
    reporter.say(f"recipe {loaded.name}, model {loaded.model}, output {loaded.output}")
    with reporter.stage("start"):  # torch takes seconds to import
        from compress.report.table import scorecard_table
        from compress.run.loop import run as run_recipe
    card = run_recipe(loaded, fresh=fresh, keep_work=keep_work, reporter=reporter, device=device, strict=strict)
    if as_json:
        typer.echo(json.dumps({"folder": loaded.output, **json.loads(card.to_json())}))
        return
    if not quiet:
        show(scorecard_table(card))
    for artifact in card.artifacts:
        typer.echo(str(Path(loaded.output) / artifact.path))


def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    set: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Compress one block to estimate the time.")] = False,
    device: DeviceOption = None,
) -> None:
    """Prove a recipe legal for its model, read its texts, and show sizes, memory and disk; reads no weights."""
    from compress.plan.make import make_plan
    from compress.plan.texts import read_texts
    from compress.recipe import load_recipe

    load_plugins(plugin)
    made = make_plan(load_recipe(recipe, set or (), model=model, output=output), weights=rehearse)
    made = replace(made, warnings=(*made.warnings, *read_texts(made)))
    estimate = None
    if rehearse:
        from compress.report.progress import Reporter

        with Reporter(0 if as_json else 1).stage("rehearsal", told=False):
            from compress.run.rehearse import rehearse as rehearse_plan

            estimate = rehearse_plan(made, device)
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), **({"estimated_seconds": estimate.as_dict()} if estimate else {})}))
        return
    from compress.report.plan_table import plan_table

    show(plan_table(made, estimate))
