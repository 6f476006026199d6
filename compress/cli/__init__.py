"""The command line: thin. Parses, calls the library, prints; every CompressError becomes one line and an exit code."""

from __future__ import annotations

from compress.cli.advise import advise
from compress.cli.app import Command, app, main
from compress.cli.check import verify
from compress.cli.examples import EXAMPLES, epilog
from compress.cli.judge import compare, score
from compress.cli.ladder import ladder
from compress.cli.lists import methods, recipes
from compress.cli.publish import publish
from compress.cli.reproduce import reproduce
from compress.cli.talk import chat, generate
from compress.cli.work import plan, run

__all__ = ["app", "main"]

# in the order of --help
for command in (
    run, ladder, plan, advise, recipes, methods, score, compare, chat, generate, verify, publish, reproduce,
):  # fmt: skip
    app.command(cls=Command, epilog=epilog(EXAMPLES.get(command.__name__, ())))(command)
