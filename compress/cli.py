"""The command line: thin. Parses, calls the library, prints; every CompressError becomes one line and an exit code."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import __version__
from compress.errors import CompressError, GateFailed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Shrink language models: recipes in, files that stock engines run and honest scores out.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled recipe.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder, GGUF file or hub id, instead of the recipe's model.")
]
OutputOption = Annotated[str | None, typer.Option("--output", help="Output folder, instead of the recipe's.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value, as calibration.samples=64; repeatable.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A Python file that registers codecs or containers; its code runs. Repeatable."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps; by default COMPRESS_DEVICE, else the CPU."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at what speaks against the original instead of noting it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print what every stage does.")]


INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _version(show: bool) -> None:
    if show:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(renderable)


def _load_plugins(files: list[str] | None) -> None:
    from compress import plugins

    for file in files or ():
        plugins.load(file)


@app.command()
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
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Carry out a recipe: calibrate, quantize, export, check, score."""
    from compress.recipe import load_recipe

    _load_plugins(plugin)
    loaded = load_recipe(recipe, set or (), model=model, output=output)
    from compress.report.progress import Reporter
    from compress.report.table import scorecard_table
    from compress.run.loop import run as run_recipe

    reporter = Reporter(0 if quiet else 2 if verbose else 1)
    card = run_recipe(loaded, fresh=fresh, keep_work=keep_work, reporter=reporter, device=device, strict=strict)
    _print(scorecard_table(card))
    for artifact in card.artifacts:
        typer.echo(str(Path(loaded.output) / artifact.path))


@app.command()
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

    _load_plugins(plugin)
    made = make_plan(load_recipe(recipe, set or (), model=model, output=output), weights=rehearse)
    made = replace(made, warnings=(*made.warnings, *read_texts(made)))
    estimate = None
    if rehearse:
        from compress.run.rehearse import rehearse as rehearse_plan

        estimate = rehearse_plan(made, device)
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), **({"estimated_seconds": estimate.as_dict()} if estimate else {})}))
        return
    from compress.report.plan_table import plan_table

    _print(plan_table(made, estimate))


@app.command()
def methods(plugin: PluginOption = None, as_json: JsonOption = False) -> None:
    """List what a recipe can be made of: steps, solvers, codecs with bits a weight, containers and their engines."""
    _load_plugins(plugin)
    if as_json:
        from compress.catalog import as_dict

        typer.echo(json.dumps(as_dict()))
        return
    from compress.report.methods_table import methods_table

    _print(methods_table())


@app.command()
def score(
    targets: Annotated[list[str], typer.Argument(help="GGUF files, Hugging Face folders, hub ids, folders of runs.")],
    against: Annotated[str | None, typer.Option("--against", help="The original: folder, file or hub id.")] = None,
    suite: Annotated[str, typer.Option("--suite", help="quick, standard, full, safety, or a suite file.")] = "quick",
    speed: Annotated[bool, typer.Option("--speed", help="Time each in its engine, too, in turns.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", help="A folder for a scorecard of each, for compress compare.")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither keep what the original predicts nor use what was kept.")
    ] = False,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
) -> None:
    """Perplexity, KL divergence and task accuracy of files and folders against the original."""
    from compress.report.progress import Reporter
    from compress.report.scorecard import write_each
    from compress.run.score import Settings, score_targets

    _load_plugins(plugin)
    settings = Settings(suite, device, strict=strict, speed=speed, remember=not no_cache)
    cards = score_targets(targets, against, settings, Reporter(0 if quiet or as_json else 1))
    written = [] if output is None else write_each(cards, output)
    if as_json:
        texts = [card.to_json().rstrip() for card in cards]
        typer.echo(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
    else:
        _show(cards)
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if not all(card.gate.passed for card in cards):
        raise typer.Exit(GateFailed.exit_code)


def _show(cards: list[Any]) -> None:
    """One scorecard, or several side by side."""
    from compress.report.table import scorecard_table

    if len(cards) == 1:
        _print(scorecard_table(cards[0]))
        return
    from compress.report.advice import advise
    from compress.report.compare import Run
    from compress.report.compare import compare as compare_runs
    from compress.report.compare_table import CompareTable

    comparison = compare_runs([Run(card) for card in cards])
    _print(CompareTable(comparison, advise(comparison)))


@app.command()
def generate(
    file: Annotated[str, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most this many new tokens.")] = 64,
) -> None:
    """Let llama.cpp continue a prompt with a GGUF file, greedily."""
    if not prompt:
        raise CompressError("the prompt is empty; give some text to continue")
    from compress.engines.llama_cpp import LlamaCpp

    with LlamaCpp(file) as model:
        typer.echo(prompt + model.generate(prompt, tokens))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of finished runs, scorecards, or folders of either; LABEL=RUN names one."),
    ],
    memory: Annotated[
        str | None, typer.Option("--memory", help="What the model may take, as 4GB: what to choose.")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write a page with plots here; - is stdout.")] = None,
    md: Annotated[str | None, typer.Option("--md", help="Write Markdown here; - is stdout.")] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="Write all numbers as CSV here; - is stdout.")] = None,
    picture: Annotated[
        str | None, typer.Option("--picture", help="Write the plot of size and KL here (.png, .svg).")
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
        _print(CompareTable(comparison, advice))
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


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="The folder of a finished run, or an artifact in it.")],
) -> None:
    """Recompute the checksums of what a run delivered: per file ok, changed, missing or unexpected."""
    from compress.report.checksums import OK
    from compress.report.checksums import verify as verify_files

    found = verify_files(target)
    for name, status in found.items():
        typer.echo(f"{status:<10} {name}")
    if problems := sum(status != OK for status in found.values()):
        raise CompressError(
            f"{problems} of {len(found)} files of {target} are not what was delivered; "
            "fetch them again, or run the recipe again with --fresh"
        )


def main() -> None:
    """Entry point of the `compress` command: every foreseen error is a line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters shows question marks
    try:
        code = app(standalone_mode=False)
    except CompressError as error:
        code = _fail(error.exit_code, *str(error).splitlines())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(1, f"{where}{error.strerror or error}; check the path, its permissions and the free space")
    except MemoryError:
        code = _fail(1, "out of memory; `compress plan` shows what a run needs")
    except typer.BadParameter.__mro__[1] as error:  # type: ignore[misc]  # UsageError, which typer does not export
        error.show()
        code = error.exit_code
    if code == INTERRUPTED:  # typer itself turns Ctrl-C into this code
        hint = "; the same command continues from the last finished block" if sys.argv[1:2] == ["run"] else ""
        _fail(code, f"interrupted{hint}")
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(code: int, *lines: str) -> int:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
