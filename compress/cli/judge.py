"""compress score, compress compare: how close, how fast, which one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.app import load_plugins, show
from compress.cli.options import DeviceOption, JsonOption, PluginOption, StrictOption
from compress.errors import GateFailed


def score(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET", help="GGUF files, Hugging Face folders, hub ids, folders of runs.")
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original: folder, file or hub id.")
    ] = None,
    suite: Annotated[
        str, typer.Option("--suite", metavar="SUITE", help="quick, standard, full, safety, or a suite file.")
    ] = "quick",
    speed: Annotated[bool, typer.Option("--speed", help="Time each in its engine, too, in turns.")] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FOLDER", help="A folder for a scorecard of each, for compress compare."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither keep what the original predicts nor use what was kept.")
    ] = False,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the table.")] = False,
    device: DeviceOption = None,
) -> None:
    """Perplexity, KL divergence and task accuracy of files and folders against the original."""
    from compress.report.progress import Reporter
    from compress.report.scorecard import write_each

    load_plugins(plugin)
    reporter = Reporter(0 if quiet or as_json else 1)
    with reporter.stage("start"):  # torch takes seconds to import
        from compress.run.score import Settings, score_targets
    settings = Settings(suite, device, strict=strict, speed=speed, remember=not no_cache)
    cards = score_targets(targets, against, settings, reporter)
    written = [] if output is None else write_each(cards, output)
    if as_json:
        texts = [card.to_json().rstrip() for card in cards]
        typer.echo(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
    else:
        _side_by_side(cards)
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if not all(card.gate.passed for card in cards):
        raise typer.Exit(GateFailed.exit_code)


def _side_by_side(cards: list[Any]) -> None:
    """One scorecard, or several side by side."""
    from compress.report.table import scorecard_table

    if len(cards) == 1:
        show(scorecard_table(cards[0]))
        return
    from compress.report.advice import advise
    from compress.report.compare import Run
    from compress.report.compare import compare as compare_runs
    from compress.report.compare_table import CompareTable

    comparison = compare_runs([Run(card) for card in cards])
    show(CompareTable(comparison, advise(comparison)))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN", help="Folders of finished runs, scorecards, or folders of either; LABEL=RUN names one."
        ),
    ],
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="What the model may take, as 4GB: what to choose.")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page with plots here; - is stdout.")
    ] = None,
    md: Annotated[str | None, typer.Option("--md", metavar="FILE", help="Write Markdown here; - is stdout.")] = None,
    csv: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write all numbers as CSV here; - is stdout.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Write the plot of size and KL here (.png, .svg).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The same as --md -.")] = False,
    as_json: JsonOption = False,
) -> None:
    """One table over several runs, and which of them to take."""
    from compress.recipe.schema import byte_count

    limit = None if memory is None else byte_count(memory)
    if memory is not None and not limit:
        raise typer.BadParameter(f"expected a size like 4GB or 512MiB, got {memory}", param_hint="--memory")
    from compress.report.advice import advise
    from compress.report.compare import compare as compare_runs
    from compress.report.compare_data import to_csv, to_json
    from compress.report.compare_table import CompareTable, compare_markdown
    from compress.report.runs import find_runs

    found, skipped = find_runs(runs)
    for line in skipped:
        typer.echo(f"skipped: {line}", err=True)
    comparison = compare_runs(found)
    advice = advise(comparison, limit, (memory or "").strip())
    wanted: list[tuple[str | None, Any]] = [
        ("-" if markdown else None, lambda: compare_markdown(comparison, advice)),
        (md, lambda: compare_markdown(comparison, advice)),
        (csv, lambda: to_csv(comparison)),
        ("-" if as_json else None, lambda: to_json(comparison, advice)),
        (html, lambda: _page(comparison, advice)),
        (picture, lambda: _picture(comparison, picture or "")),
    ]
    if sum(target == "-" for target, _ in wanted) > 1:
        raise typer.BadParameter("only one of --md, --csv, --html, --json and --markdown can go to stdout")
    made = [(target, make()) for target, make in wanted if target is not None]
    if not any(target == "-" for target, _ in made):
        show(CompareTable(comparison, advice))
    for target, content in made:
        _deliver(target, content)


def _page(comparison: Any, advice: Any) -> str:
    from compress.report.page import page

    return page(comparison, advice)


def _picture(comparison: Any, target: str) -> bytes:
    from compress.report.plots import picture

    return picture(comparison, target)


def _deliver(target: str, content: str | bytes) -> None:
    """Text to stdout, or a file whole or not at all."""
    if target == "-" and isinstance(content, str):
        typer.echo(content, nl=False)
        return
    from compress.files import write_synced

    write_synced(Path(target), content.encode() if isinstance(content, str) else content)
    typer.echo(f"wrote {target}", err=True)
