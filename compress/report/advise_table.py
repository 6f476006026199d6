"""What `compress advise` proposes, for people: a paragraph a proposal, commands that can be copied whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from compress.report.layout import Facts, Prose
from compress.report.numbers import estimate, human_bytes, percent

if TYPE_CHECKING:
    from compress.advise import Advice, Proposal
    from compress.machine import Machine

NOTABLE = 0.05
"""Of the weights: where more of them fall back, the measured figure is of something else."""


def advise_table(advice: Advice) -> RenderableType:
    """Model and machine, the proposals, and what to know of them."""
    parts: list[RenderableType] = [_header(advice)]
    for number, proposal in enumerate(advice.proposals, 1):
        parts += ["", _proposal(number, proposal)]
    parts += ["", *map(Prose, _closing(advice))]
    return Group(*parts)


def _header(advice: Advice) -> Group:
    size = f"{_count(advice.parameters)} parameters, {human_bytes(advice.original)}"
    title = Text.assemble((advice.wish.model, "bold"), f" for {advice.wish.use}  ·  {size}")
    return Group(Prose(title), Prose(f"on {machine_words(advice.wish.machine)}"))


def machine_words(machine: Machine) -> str:
    """A machine in one line; what nothing told is left out."""
    cpu, memory = machine.cpu, machine.memory
    parts = [f"{cpu.model or 'a processor'}, {cpu.cores} {'core' if cpu.cores == 1 else 'cores'}"]
    if memory.there is not None:
        of = f" of {human_bytes(memory.total)}" if memory.total not in (None, memory.there) else ""
        parts.append(f"{human_bytes(memory.there)}{of} memory{' (a container)' if memory.limited else ''}")
    parts += [f"{gpu.name} with {human_bytes(gpu.free)}" for gpu in machine.gpus] or ["no GPU with memory of its own"]
    return "  ·  ".join(parts)


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return f"{parameters:,}"


def _proposal(number: int, proposal: Proposal) -> RenderableType:
    title = Text.assemble(
        f"{number}  ", (proposal.candidate.recipe, "bold"),
        f"  ·  {human_bytes(proposal.bytes)} at {proposal.bits:.2f} bits per weight  ·  {proposal.engine}, {proposal.where}",
    )  # fmt: skip
    lines = [Prose(line, indent=0) for line in (proposal.candidate.why, *_facts(proposal))]
    flags = Facts(tuple(proposal.flags))
    inside = Group(
        *lines, *(Padding(_Command(line), (0, 0, 0, 2)) for line in proposal.commands), Padding(flags, (0, 0, 0, 4))
    )
    return Group(Prose(title, indent=3), Padding(inside, (0, 0, 0, 3)))


@dataclass(frozen=True)
class _Command:
    """A command as wide as there is room, continued as shells do, so that it can be copied whole."""

    line: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        rows, room = [""], options.max_width - 2
        for word in self._words():
            if rows[-1] and len(rows[-1]) + 1 + len(word) > room:
                rows.append("  ")
            rows[-1] += word if not rows[-1].strip() else f" {word}"
        yield Text(" \\\n".join(rows), style="bold", overflow="fold")

    def _words(self) -> list[str]:
        """What stays on a line: a flag with its value."""
        words: list[str] = []
        for word in map(shlex.quote, shlex.split(self.line)):
            if words and words[-1].startswith("-") and " " not in words[-1] and not word.startswith("-"):
                words[-1] += f" {word}"
            else:
                words.append(word)
        return words


def _facts(proposal: Proposal) -> Iterator[str]:
    expected, making = proposal.expected, proposal.making
    if expected is None:
        yield "Expected quality: not measured yet."
    else:
        yield f"Expected KL divergence {estimate(expected.kl, expected.low, expected.high)} nats a token: measured on {expected.of}, {expected.text}."
    if proposal.fallen >= NOTABLE:
        yield (
            f"{percent(proposal.fallen)} of this model's weights fall back to other types (their rows do not divide into blocks)"
            f"{', of which that figure says nothing' if expected else ''}."
        )
    yield f"Running takes {human_bytes(proposal.needed)} with that context."
    where = "fits here" if making.fits else "does not fit here" if making.fits is False else "nobody knows whether here"
    yield f"Making it takes {human_bytes(making.needed)} of memory: {where}."


def _closing(advice: Advice) -> Iterator[str]:
    machine = advice.wish.machine
    if advice.smallest is not None:
        name, needed = advice.smallest
        yield (
            f"Nothing fits. The smallest, {name}, takes {human_bytes(needed)} with a short context; there are "
            f"{human_bytes((machine.memory.there or 0) + machine.vram)}. Take a smaller model, or a larger machine."
        )
    elif advice.proposals:
        if advice.use.calibrate:
            yield f"{advice.use.calibrate}."
        yield "Quality ranks recipes; what your model loses, `compress score` says. Sizes and memory are computed for it."
    for why in dict.fromkeys(why for _, why in advice.left_out):
        yield f"Left out: {', '.join(name for name, other in advice.left_out if other == why)}: {why}"
