"""compress plan, compress run: what a recipe will do, and doing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    ModelOption,
    OutputOption,
    PluginOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    StrictOption,
    VerboseOption,
)

if TYPE_CHECKING:
    from compress.plan.plan import Plan
    from compress.plan.verdict import Verdict


def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    set: SetOption = None,
    plugin: PluginOption = None,
    fresh: FreshOption = False,
    keep_work: KeepWorkOption = False,
    device: DeviceOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Carry out a recipe: calibrate, quantize, export, check, score."""
    from compress.recipe import load_recipe

    load_plugins(plugin)
    loaded = load_recipe(recipe, set or (), model=model, output=output, base=base, adapter=adapter)
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
    base: BaseOption = None,
    adapter: AdapterOption = None,
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

    def planned(more: Sequence[str] = ()) -> Plan:
        return make_plan(
            load_recipe(recipe, (*(set or ()), *more), model=model, output=output, base=base, adapter=adapter),
            weights=rehearse,
        )

    made = planned()
    made = replace(made, warnings=(*made.warnings, *read_texts(made)))
    estimate = None
    if rehearse:
        from compress.report.progress import Reporter

        with Reporter(0 if as_json else 1).stage("rehearsal", told=False):
            from compress.run.rehearse import rehearse as rehearse_plan

            estimate = rehearse_plan(made, device)
    verdict = _verdict(made, planned, None if estimate is None else estimate.total, device)
    if as_json:
        estimated = {"estimated_seconds": estimate.as_dict()} if estimate else {}
        typer.echo(json.dumps({**made.as_dict(), **estimated, "verdict": verdict.as_dict()}))
        return
    from compress.report.plan_table import plan_table

    show(plan_table(made, estimate, verdict))


def _verdict(
    plan: Plan, planned: Callable[[Sequence[str]], Plan], rehearsed: float | None, device: str | None
) -> Verdict:
    """Whether it fits this machine, and how long it takes where a rehearsal or an earlier run tells."""
    from compress.machine import look
    from compress.plan.duration import Duration, duration, runs_like
    from compress.plan.verdict import judge

    machine = look()
    if rehearsed is not None:
        found: Duration | None = Duration(rehearsed, rehearsed, "measured by rehearsal")
    else:
        found = duration(plan, runs_like(plan, machine, device).known())
    return judge(plan, machine, duration=found, replan=planned)
