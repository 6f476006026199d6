"""compress generate, compress chat: let a model speak."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.app import load_plugins
from compress.cli.options import PluginOption
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.engines.speech import Speaker
    from compress.run.talk import Conversation

TargetArgument = Annotated[
    str, typer.Argument(help="A GGUF file, a folder of a model, or of a finished run.", metavar="MODEL")
]
TokensOption = Annotated[int, typer.Option("--tokens", "-n", min=1, metavar="N", help="At most this many new tokens.")]
ContextOption = Annotated[
    int, typer.Option("--context", "-c", min=16, metavar="N", help="Tokens that question and answer may take.")
]
SystemOption = Annotated[str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")]
TemperatureOption = Annotated[
    float, typer.Option("--temp", min=0.0, metavar="T", help="Temperature; 0 takes the likeliest token.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, metavar="N", help="Draw from so many tokens; 0: all.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, metavar="P", help="Draw from the fewest with this probability.")
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, metavar="P", help="Leave out tokens below this share of the likeliest."),
]
PenaltyOption = Annotated[
    float, typer.Option("--repeat-penalty", min=0.01, metavar="P", help="Above 1: less of what was said already.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, metavar="N", help="Of the draws; without it they differ every time.")
]

AS_ADVISED = "By default what the model's files advise, else {}."
USUAL = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # llama.cpp's own

COMMANDS = """\
/exit           leave (so do /quit, /bye and Ctrl-D)
/reset          forget what was said
/system TEXT    tell the model something first, and forget what was said
Ctrl-C          stop an answer"""


def generate(
    model: TargetArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue; without it, or as -, it is read from stdin."),
    ] = None,
    tokens: TokensOption = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat template; print the answer alone.")
    ] = False,
    system: SystemOption = "",
    context: ContextOption = 4096,
    temp: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repeat_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    plugin: PluginOption = None,
) -> None:
    """Let a model continue a text, or with --chat answer it; by default the likeliest token every time."""
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise CompressError("no prompt: give some text to continue, or pipe it in")
        prompt = sys.stdin.read()
    if not prompt or (chat and not prompt.strip()):
        raise CompressError("the prompt is empty; give some text to continue")
    if system and not chat:
        raise typer.BadParameter("it belongs to a talk; add --chat", param_hint="--system")
    load_plugins(plugin)
    from compress.engines.sampling import Sampling, chooser

    choose = chooser(Sampling(temp, top_k, top_p, min_p, repeat_penalty, seed))
    with _opened(model, context) as speaker:
        if chat:
            pieces: Iterable[str] = _conversation(speaker, choose, context, tokens, system).ask(prompt.strip())
        else:
            ids = speaker.prompt(prompt)
            typer.echo(prompt, nl=False)
            pieces = speaker.stream(ids, tokens, choose)
        if not _print(pieces):
            hint = "" if chat or speaker.template is None else "; it has a chat template: ask with --chat"
            typer.echo(f"note: the model ended at once{hint}", err=True)


def chat(
    model: TargetArgument,
    system: SystemOption = "",
    tokens: TokensOption = 512,
    context: ContextOption = 4096,
    temp: Annotated[float | None, typer.Option("--temp", min=0.0, metavar="T", help=AS_ADVISED.format("0.8"))] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, metavar="N", help=AS_ADVISED.format("40"))] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0, max=1, metavar="P", help=AS_ADVISED.format("0.95"))
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", min=0, max=1, metavar="P", help=AS_ADVISED.format("0.05"))
    ] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option("--repeat-penalty", min=0.01, metavar="P", help=AS_ADVISED.format("1"))
    ] = None,
    seed: SeedOption = None,
    plugin: PluginOption = None,
) -> None:
    """Talk to a model in its chat template; answers appear as they are made. In a pipe every line is a message."""
    load_plugins(plugin)
    from compress.engines.sampling import Sampling, chooser

    given = {"temperature": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": repeat_penalty}
    with _opened(model, context) as speaker:
        choose = chooser(Sampling.first({**given, "seed": seed}, speaker.suggests, USUAL))
        talk = _conversation(speaker, choose, context, tokens, system)
        if sys.stdin.isatty():
            typer.echo(f"{Path(model).name} in {speaker.engine.name}; /help lists the commands", err=True)
        for line in _lines():
            if line.startswith("/"):
                if _leaves(line, talk):
                    break
                continue
            before = talk.forgotten
            try:
                _print(talk.ask(line))
            except KeyboardInterrupt:
                typer.echo()
            if talk.forgotten > before:
                typer.echo(
                    f"note: the oldest {talk.forgotten - before} exchanges were forgotten to make room", err=True
                )


def _leaves(line: str, talk: Conversation) -> bool:
    """Carries out a command; whether it ends the talk."""
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return True
    if name == "/help":
        typer.echo(COMMANDS, err=True)
    elif name == "/reset":
        talk.clear()
    elif name == "/system":
        talk.clear()
        talk.system = rest.strip()
    else:
        typer.echo(f"note: no command {name}; /help lists them", err=True)
    return False


def _lines() -> Iterator[str]:
    """What people type at a terminal, or the lines of a pipe; empty ones left out."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history for input()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if line:
            yield line


def _print(pieces: Iterable[str]) -> bool:
    """Pieces as they come, and a line end; whether there were any."""
    some = False
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
        some = True
    typer.echo()
    return some


def _opened(model: str, context: int) -> AbstractContextManager[Speaker]:
    from compress.engines.speech import open_speaker
    from compress.run.targets import expanded

    return open_speaker(next(expanded([model])), context)


def _conversation(speaker: Speaker, choose: object, context: int, tokens: int, system: str) -> Conversation:
    from compress.run.talk import Conversation

    for note in speaker.notes:
        typer.echo(f"note: {note}", err=True)
    if speaker.context is not None and speaker.context < context:
        typer.echo(
            f"note: the model reads {speaker.context:,} tokens at once, fewer than --context {context:,}", err=True
        )
        context = speaker.context
    return Conversation(speaker, choose, context, tokens, system)  # type: ignore[arg-type]
