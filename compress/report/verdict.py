"""A plan's last lines: does it fit this machine, what would make it fit, how long will it take."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from compress.report.layout import Facts
from compress.report.numbers import human_bytes, human_seconds

if TYPE_CHECKING:
    from compress.plan.duration import Duration
    from compress.plan.verdict import Held, Need, Verdict


def verdict_lines(verdict: Verdict, model: str) -> RenderableType:
    """One row a question. model: as commands name it."""
    told: list[tuple[str, str | Text]] = [
        ("memory to make it", _need(verdict.memory)),
        ("disk to make it", _need(verdict.disk)),
    ]
    if verdict.missing:
        told.append(("", f"The original, {human_bytes(verdict.missing)}, is not here yet: it comes on top"))
    told += [(f"to run it in {held.running.host.name}", _held(held, model)) for held in verdict.held]
    if verdict.duration is not None:
        told.append(("time", _time(verdict.duration)))
    return Group(Text("On this machine", style="bold"), Facts(tuple(told)))


def _word(fits: bool | None) -> tuple[str, str]:
    return ("unknown", "") if fits is None else ("fits", "green") if fits else ("does not fit", "bold red")


def _need(need: Need) -> Text:
    there = "" if need.there is None else f" of the {human_bytes(need.there)} {need.words}"
    parts: list[str | tuple[str, str]] = [_word(need.fits), f": {human_bytes(need.needed)}{there}"]
    if need.fits is False:
        parts.append(f". {_remedy(need)}")
    return Text.assemble(*parts)


def _remedy(need: Need) -> str:
    remedy, more = need.remedy, f"{human_bytes(need.needed - (need.there or 0))} more must be free"
    if remedy is None:
        return f"No setting of the recipe helps: {more}"
    settings = " ".join(f"--set {shlex.quote(setting)}" for setting in remedy.settings)
    if remedy.needed <= (need.there or 0):
        return f"With {settings} it fits: {human_bytes(remedy.needed)}"
    return f"{more[0].upper()}{more[1:]}; with {settings} only {human_bytes(remedy.needed - (need.there or 0))}"


def _held(held: Held, model: str) -> Text:
    running, room = held.running, held.room
    kept = " or ".join(f"{human_bytes(running.per_1k(codec))} ({codec})" for codec in running.codecs)
    sizes = f"Weights {human_bytes(running.weights)}, KV cache {kept} per 1k tokens"
    if room is None:
        why = "it wants a GPU, and none was found" if running.host.gpu else "nothing tells this machine's memory"
        return Text(f"unknown: {why}. {sizes}")
    there = f"{room.words}, {human_bytes(room.there)}"
    if held.fits:
        return Text.assemble(_word(True), f" {there}, with {' or '.join(_contexts(held))}. {sizes}")
    least = f"{human_bytes(held.least)} with a context of {running.least:,} tokens"
    return Text.assemble(_word(False), f" {there}: {least}. {sizes}. What fits: compress advise {model}")


def _contexts(held: Held) -> Iterator[str]:
    """The longest context by codec of the cache, up to the first with which it is all that the model knows."""
    for codec, context in held.contexts:
        if context:
            yield f"{context:,} tokens of context{'' if codec == held.running.codecs[0] else f' ({codec})'}"
        if context >= held.running.longest:
            return


def _time(duration: Duration) -> Text:
    low, high = human_seconds(duration.low), human_seconds(duration.high)
    return Text.assemble((f"about {low}" if low == high else f"{low} to {high}", "bold"), f", {duration.source}")
