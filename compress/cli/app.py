"""The application that commands join, what they share, and how every error becomes a line and an exit code."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import textwrap
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from compress import __version__
from compress.cli.examples import START, epilog
from compress.errors import CompressError

LOG_WIDTH = 100  # columns of what is no terminal and has no COLUMNS


class Command(TyperCommand):
    """A command whose --help names values, not Python's types."""

    def get_params(self, ctx: Any) -> list[Any]:
        return list(map(_untyped, super().get_params(ctx)))


class Group(TyperGroup):
    """The same of the application."""

    def get_params(self, ctx: Any) -> list[Any]:
        return list(map(_untyped, super().get_params(ctx)))


def _untyped(parameter: Any) -> Any:
    """An argument is called by its metavar alone, a flag has no value."""
    if parameter.param_type_name == "argument":
        parameter.display_type_rich = lambda ctx: None
    elif parameter.is_flag:
        parameter.metavar = ""
    parameter._get_number_range_help_str = lambda: None  # an error says it, and narrow screens have no room
    return parameter


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=epilog(START),
    help="Shrink language models: recipes in, files that stock engines run and honest scores out.",
)

CONTINUES = {
    "run": "; the same command continues from the last finished block",
    "publish": "; the same command continues, and does not send again what has arrived",
}
"""What to say of a command that was stopped."""
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells report them


def _version(show: bool) -> None:
    if show:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def show(renderable: Any) -> None:
    """Print for people: as wide as the terminal, and in pipes and files LOG_WIDTH columns or what COLUMNS says."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = LOG_WIDTH
    console.print(renderable)


def load_plugins(files: list[str] | None) -> None:
    from compress import plugins

    for file in files or ():
        plugins.load(file)


def main() -> None:
    """Entry point of the `compress` command: every foreseen error is a line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters shows question marks
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if code in (INTERRUPTED, TERMINATED):  # typer itself turns Ctrl-C into this code
        what = "interrupted" if code == INTERRUPTED else "stopped by SIGTERM"
        _fail(code, f"{what}{CONTINUES.get(''.join(sys.argv[1:2]), '')}")
    raise SystemExit(code)


class _Terminated(BaseException):
    """SIGTERM: everything is let go of as at Ctrl-C."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _run() -> int:
    """The exit code of the command that was asked for; its errors are told."""
    try:
        code = app(prog_name="compress", standalone_mode=False)
    except CompressError as error:
        code = _fail(error.exit_code, *str(error).splitlines())
    except _Terminated:
        code = TERMINATED
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
    except (Exception, SystemExit) as error:
        from compress.plugins import blamed

        if (line := blamed(error)) is None:
            raise
        code = _fail(1, line)
    return code if isinstance(code, int) else 0


def _fail(code: int, *lines: str) -> int:
    """One line each; a terminal gets it broken between words."""
    width = shutil.get_terminal_size().columns
    for line in lines:
        text = f"error: {line}"
        if sys.stderr.isatty():
            text = textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        print(text, file=sys.stderr)
    return code
