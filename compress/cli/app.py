"""The application that commands join, what they share, and how every error becomes a line and an exit code."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer

from compress import __version__
from compress.errors import CompressError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Shrink language models: recipes in, files that stock engines run and honest scores out.",
)

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _version(show: bool) -> None:
    if show:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def show(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
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
    except (Exception, SystemExit) as error:
        from compress.plugins import blamed

        if (line := blamed(error)) is None:
            raise
        code = _fail(1, line)
    if code == INTERRUPTED:  # typer itself turns Ctrl-C into this code
        hint = "; the same command continues from the last finished block" if sys.argv[1:2] == ["run"] else ""
        _fail(code, f"interrupted{hint}")
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(code: int, *lines: str) -> int:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code
