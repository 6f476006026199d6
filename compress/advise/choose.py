"""Two or three recipes for a model on a machine, the best expected quality first, with the flags that run them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from compress.advise.layout import Layout, Stack, flags, lay_out
from compress.advise.rules import Candidate, Expected, Facts, Propose, Quality, Rules, Use, quality, rules
from compress.errors import CompressError, PlanError
from compress.machine import Machine
from compress.models.checkpoint import Checkpoint
from compress.models.locate import model_location
from compress.models.spec import load_spec
from compress.plan.make import make_plan
from compress.plan.running import SHORTEST, Running, gpu_words, rooms, running
from compress.plan.verdict import Need
from compress.recipe import load_recipe
from compress.report.numbers import human_bytes

if TYPE_CHECKING:
    from compress.plan.plan import Plan


@dataclass(frozen=True)
class Wish:
    """model: as a command names it; machine: it shall run on; use: of rules.yaml; here: the machine that makes it."""

    model: str
    machine: Machine
    use: str
    here: Machine


@dataclass(frozen=True)
class Proposal:
    """One recipe that fits. bytes: of the artifact; context, codec: of the cache; layout: where llama.cpp has what, None where
    the engine or the machine leaves no choice; where: in words; fast: nothing lies in slower memory than need be; fallen: share of
    the weights that cannot be stored as the recipe says."""

    candidate: Candidate
    container: str
    engine: str
    bytes: int
    bits: float
    context: int
    codec: str
    needed: int
    where: str
    fast: bool
    fallen: float
    expected: Expected | None
    making: Need
    commands: tuple[str, ...]
    flags: tuple[tuple[str, str], ...]
    layout: Layout | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "recipe": self.candidate.recipe,
            "why": self.candidate.why,
            "container": self.container,
            "engine": self.engine,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "context": self.context,
            "cache": self.codec,
            "needed_bytes": self.needed,
            "where": self.where,
            "fallen_back": self.fallen,
            "expected": None if self.expected is None else asdict(self.expected),
            "layout": None if self.layout is None else asdict(self.layout),
            "memory_to_make": {**asdict(self.making), "fits": self.making.fits},
            "commands": list(self.commands),
            "flags": [{"flag": flag, "why": why} for flag, why in self.flags],
        }


@dataclass(frozen=True)
class Advice:
    """What was found. original: bytes of the original's weights; smallest: recipe and bytes that the smallest candidate takes to
    run, where none fits; left_out: candidates that this model cannot have, and why."""

    wish: Wish
    use: Use
    original: int
    parameters: int
    proposals: tuple[Proposal, ...]
    smallest: tuple[str, int] | None = None
    left_out: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": self.wish.model,
            "use": self.wish.use,
            "parameters": self.parameters,
            "source_bytes": self.original,
            "machine": self.wish.machine.as_dict(),
            "proposals": [proposal.as_dict() for proposal in self.proposals],
            "smallest": None
            if self.smallest is None
            else dict(zip(("recipe", "needed_bytes"), self.smallest, strict=True)),
            "left_out": dict(self.left_out),
        }


def advise(wish: Wish, by: Rules | None = None, known: Quality | None = None) -> Advice:
    """Recipes for a wish. by, known: the rules and measurements that ship.

    Raises what opening the model raises, PlanError where no candidate can be had of it, and CompressError where nothing tells
    the machine's memory.
    """
    if wish.machine.memory.there is None:
        raise CompressError("nothing tells how much memory this machine has; say it with --memory, as --memory 16GB")
    by, known = by or rules(), known or quality()
    checkpoint = Checkpoint.open(model_location(wish.model), weights=False)
    facts, use = Facts.of(load_spec(checkpoint.config), wish.machine, by), by.uses[wish.use]
    found, options, left_out = _Chosen(by.propose, facts.gpu), [], []
    for candidate in by.candidates:
        if found.enough or not candidate.when.holds(facts):
            continue
        try:
            recipe = load_recipe(candidate.recipe, model=wish.model)  # which is called after the model
            plan = make_plan(recipe.model_copy(update={"model": str(checkpoint.place)}))
        except PlanError as error:
            left_out.append((candidate.recipe, error.problems[0]))
            continue
        if plan.artifact_bytes[plan.recipe.containers[0].name] >= plan.source_bytes:
            left_out.append((candidate.recipe, f"no smaller than the original, {human_bytes(plan.source_bytes)}"))
            continue
        option = _Option(candidate, plan, running(plan)[0], wish, use, known.expected(candidate.recipe))
        options.append(option)
        found.take(option.proposal())
    if not options:
        raise PlanError([f"{name}: {why}" for name, why in left_out] or "no rule of compress advise holds here")
    if not found.proposals:
        for option in options:
            found.take(option.proposal(shorter=True))
    plan, smallest = options[0].plan, min(options, key=lambda option: option.least)
    nothing = None if found.proposals else (smallest.candidate.recipe, smallest.least)
    return Advice(wish, use, plan.source_bytes, plan.original_parameters, found.proposals, nothing, tuple(left_out))


class _Chosen:
    """Proposals as they come, the best first: each a good deal smaller than the one before of its engine, unless it is fast and
    that is not. The last place is for what those before lack where there is a GPU: one that is fast, else another engine.
    Where that leaves a single one, the smallest of those that are not a good deal smaller stands beside it."""

    def __init__(self, by: Propose, gpu: bool):
        self.by, self.gpu = by, gpu
        self._taken: list[Proposal] = []
        self._spare: Proposal | None = None
        self._alike: Proposal | None = None

    @property
    def enough(self) -> bool:
        return len(self._taken) >= self.by.most

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        if self.enough:
            return tuple(self._taken)
        more = self._spare or (self._alike if len(self._taken) == 1 else None)
        return (*self._taken, *((more,) if more else ()))

    def take(self, proposal: Proposal | None) -> None:
        """Another one, None where it does not fit."""
        if proposal is None or self.enough:
            return
        last = next((one for one in reversed(self._taken) if one.engine == proposal.engine), None)
        if last is not None and proposal.bytes > self.by.step * last.bytes and proposal.fast <= last.fast:
            self._alike = min(self._alike or proposal, proposal, key=lambda one: one.bytes)
            return
        if len(self._taken) == self.by.most - 1 and not self._adds(proposal):
            self._spare = self._spare or proposal
            return
        self._taken.append(proposal)

    def _adds(self, proposal: Proposal) -> bool:
        """Whether it is what none before is, where there is a GPU to make a difference."""
        if self.gpu and not any(one.fast for one in self._taken):
            return proposal.fast
        return not self.gpu or proposal.engine not in {one.engine for one in self._taken}


@dataclass(frozen=True)
class _Option:
    """A candidate whose plan is made, in the usual engine of its first container."""

    candidate: Candidate
    plan: Plan
    running: Running
    wish: Wish
    use: Use
    expected: Expected | None

    @property
    def least(self) -> int:
        """Bytes that it takes with the shortest context worth having, by the smallest cache."""
        one = self.running
        return min(one.needed(one.least, codec) for codec in one.codecs)

    @cached_property
    def wanted(self) -> int:
        """Tokens of context."""
        return min(self.use.context, self.running.longest)

    @property
    def fallen(self) -> float:
        """The share of the weights that are stored otherwise than the recipe says, for their rows do not divide into blocks."""
        return sum(n * t.spec.parameters for t, n in self.plan.counted if t.wanted) / self.plan.parameters

    def proposal(self, shorter: bool = False) -> Proposal | None:
        """None where the machine does not hold it with the context that is wanted, or with a shorter one worth having."""
        machine, one = self.wish.machine, self.running
        for tokens, codec in self._contexts(shorter):
            container = self.plan.recipe.containers[0]
            layout = None
            if one.host.layers and machine.gpus:
                layout = lay_out(Stack.of(self.plan, container, one, tokens, codec), one.host, machine)
                if layout is None:
                    continue
                gpus = gpu_words(machine)
                where = gpus if layout.whole else f"{gpus} and in memory" if layout.on_gpu else "in memory"
                fast = layout.whole
            else:
                room = next(
                    (room for room in rooms(one.host, machine) if one.needed(tokens, codec) <= room.there), None
                )
                if room is None:
                    continue
                where, fast = room.words, room.gpu or not machine.gpus
            return Proposal(
                candidate=self.candidate,
                container=container.name,
                engine=one.host.name,
                bytes=self.plan.artifact_bytes[container.name],
                bits=8.0 * self.plan.file_bytes[container.name] / self.plan.weights_in(container),
                context=tokens,
                codec=codec,
                needed=one.needed(tokens, codec),
                where=where,
                fast=fast,
                fallen=self.fallen,
                expected=self.expected,
                making=Need("memory", self.plan.peak_memory_bytes, self.wish.here.memory.there),
                commands=tuple(self._commands(container, tokens, codec, layout)),
                flags=tuple(self._flags(tokens, codec, layout)),
                layout=layout,
            )
        return None

    def _contexts(self, shorter: bool) -> Iterator[tuple[int, str]]:
        """What is wanted by every codec of the cache; or ever less by the smallest."""
        one = self.running
        if not shorter:
            yield from ((self.wanted, codec) for codec in one.codecs)
            return
        tokens = self.wanted // 2
        while tokens >= min(SHORTEST, self.wanted):
            yield tokens, one.codecs[-1]
            tokens //= 2

    def _flags(self, tokens: int, codec: str, layout: Layout | None) -> Iterator[tuple[str, str]]:
        one, less = self.running, tokens < self.use.context
        if layout is not None:
            yield from flags(layout)
        if not one.host.context_flag:
            return
        why = f"{tokens:,} tokens: {self.use.why}"
        if less and tokens == one.longest:
            why = f"{tokens:,} tokens, all that the model knows positions for"
        elif less:
            why = f"{tokens:,} tokens; the {self.wanted:,} for --use {self.wish.use} do not fit"
        yield (
            one.host.context_flag.format(tokens=tokens),
            f"{why}; {human_bytes(one.cache(tokens, codec))} of keys and values",
        )
        if codec != one.codecs[0]:
            saved = human_bytes(one.cache(tokens, one.codecs[0]))
            yield (
                one.host.cache_flag.format(codec=codec),
                f"keys and values in {codec}, which would take {saved} in {one.codecs[0]}",
            )

    def _commands(self, container: Any, tokens: int, codec: str, layout: Layout | None) -> Iterator[str]:
        """What to type: make it, then run it."""
        name, model = self.candidate.recipe, self.wish.model
        yield f"compress run {name} --model {quote(model)}"
        words = " ".join(flag for flag, _ in self._flags(tokens, codec, layout))
        artifact = quote(str(Path(self.plan.recipe.output) / self.plan.artifact_name(container)))
        if start := self.running.host.start:
            yield f"{start.format(file=artifact)} {words}".rstrip()
