"""One cause, one line: what befalls many tensors alike is told once a role, with how many they are and what cures it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from compress.codecs.names import (
    FIXED_NAMES,
    codec_info,
    fits,
    ggml_fallback,
    row_bytes,
    smaller_group,
    stored_bytes,
)
from compress.plan.tensor import PlannedTensor
from compress.recipe.rules import Rule
from compress.recipe.schema import Quantize, Recipe

BLOCKS = (16, 256)  # a shape that every codec's blocks divide


@dataclass(frozen=True)
class Problem:
    """Why a tensor cannot be stored as planned. name, role: empty where the recipe is the reason, whatever the tensor; of: the
    tensor, whose rows do not fit its codec, None where it is not that."""

    name: str
    role: str
    why: str
    of: PlannedTensor | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" if self.name else self.why


def of_step(why: str) -> Problem:
    """A problem of a step with all that it works on alike."""
    return Problem("", "", why)


def problem_of(planned: PlannedTensor, why: str) -> Problem:
    """A problem of a tensor that no other codec cures."""
    return Problem(planned.name, planned.spec.role, why)


def unfit(planned: PlannedTensor, why: str) -> Problem:
    """A problem of a tensor whose shape does not fit its codec."""
    return Problem(planned.name, planned.spec.role, why, planned)


@dataclass(frozen=True)
class Exchange:
    """Tensors of a role that are stored in another codec than the recipe's. cure: what to ask for instead."""

    role: str
    wanted: str
    used: str
    tensors: int
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.role} ({count_of(self.tensors)}): {self.wanted} -> {self.used}, {self.why}"


def count_of(tensors: int) -> str:
    return f"{tensors:,} tensor{'s' if tensors > 1 else ''}"


@dataclass(frozen=True)
class Cures:
    """What cures the rows that do not fit: options of a recipe's command. rule_of: the rule that chose a tensor's codec."""

    recipe: Recipe
    rule_of: Callable[[PlannedTensor], Rule | None]

    @property
    def _step(self) -> tuple[str, Quantize] | None:
        """The quantize step and how `--set` calls it."""
        steps = [(f"steps[{n}].quantize", s.options) for n, s in enumerate(self.recipe.steps) if s.kind == "quantize"]
        return steps[0] if steps else None

    def told(self, problems: Sequence[Problem]) -> list[str]:
        """A line for each role and cause."""
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in problems:
            groups.setdefault((problem.role, problem.why), []).append(problem)
        unfit = [problem.of for problem in problems if problem.of is not None]
        lines = []
        for (role, why), alike in groups.items():
            first, cure = alike[0], "" if alike[0].of is None else self._refused(alike[0].of, unfit)
            several = len(alike) > 1 and role
            line = f"{role} ({count_of(len(alike))}, first {first.name}): {why}" if several else str(first)
            lines.append(f"{line}{cure and f'; {cure}'}")
        return lines

    def _refused(self, planned: PlannedTensor, unfit: Sequence[PlannedTensor]) -> str:
        """What stores a tensor that its codec cannot hold, and all others that the same rule has put there."""
        if self._step is None:
            return ""
        where, step = self._step
        rule = self.rule_of(planned)
        alike = [other for other in unfit if self.rule_of(other) is rule]
        codec = _fewer_columns(planned.values, [other.spec.shape[-1] for other in alike]) or _fallback(alike)
        if codec is None:
            roles = dict.fromkeys((*step.ignore, *(other.spec.role for other in unfit)))
            return _set(f"{where}.ignore=[{', '.join(roles)}]")
        return self._asked(where, step, rule, alike, codec)

    def exchanged(self, counted: Iterable[tuple[PlannedTensor, int]]) -> tuple[Exchange, ...]:
        """Every role with tensors that are stored in another codec than the recipe's. counted: all tensors of a plan, each
        with how many it stands for."""
        counted = tuple(counted)
        if self._step is None or not any(t.wanted for t, _ in counted):
            return ()
        by_rule: dict[int, list[PlannedTensor]] = {}
        for t, _ in counted:
            by_rule.setdefault(self._number(t), []).append(t)
        cures = {number: self._named(number, tensors) for number, tensors in by_rule.items()}
        found: Counter[tuple[str, str, str, str, str]] = Counter()
        for t, count in counted:
            if t.wanted is not None:
                found[t.spec.role, t.wanted, t.codec, t.why, cures[self._number(t)]] += count
        return tuple(Exchange(role, wanted, used, n, why, cure) for (role, wanted, used, why, cure), n in found.items())

    def _number(self, planned: PlannedTensor) -> int:
        """Of the recipe's own rule that chose a tensor's codec; -1 where its scheme did, or nothing."""
        rule = self.rule_of(planned)
        rules = () if self._step is None else self._step[1].rules
        return next((number for number, own in enumerate(rules) if own is rule), -1)

    def _named(self, number: int, tensors: Sequence[PlannedTensor]) -> str:
        """What names the codecs that tensors of a rule (-1: of the scheme) can be stored in, where they fall back. A role has
        the largest that any of its tensors can do with."""
        codecs: dict[str, str] = {}
        fallen = dict.fromkeys(t.spec.role for t in tensors if t.wanted is not None)
        for t in tensors:
            role, name = t.spec.role, nearest_codec(t)
            if role in fallen:
                codecs[role] = max(codecs.get(role, name), name, key=lambda n: stored_bytes(n, BLOCKS))
        if self._step is None or not fallen:
            return ""
        where, step = self._step
        used = set(codecs.values())
        every = all(t.wanted is not None for t in tensors if self.rule_of(t) is not None)
        if number < 0 and every and not step.rules and len(used) == 1 and (scheme := _scheme(*used)):
            return _set(f"{where}.scheme={scheme}")
        by_codec: dict[str, list[str]] = {}
        for role, codec in codecs.items():
            by_codec.setdefault(codec, []).append(role)
        if number >= 0 and len(by_codec) == 1 and all(t.wanted is not None for t in tensors):
            return _set(f"{where}.rules[{number}].codec={next(iter(by_codec))}")
        rules = ", ".join(_rule(roles, codec) for codec, roles in by_codec.items())
        return f"rules in front of the others: {rules}" if step.rules else _set(f"{where}.rules=[{rules}]")

    def _asked(
        self, where: str, step: Quantize, rule: Rule | None, tensors: Sequence[PlannedTensor], codec: str
    ) -> str:
        """The option that gives all tensors of a rule another codec."""
        for number, own in enumerate(step.rules):
            if own is rule:
                return _set(f"{where}.rules[{number}].codec={codec}")
        if scheme := _scheme(codec):
            return _set(f"{where}.scheme={scheme}")
        told = _rule(dict.fromkeys(t.spec.role for t in tensors), codec)
        return f"a rule of its own: {told}" if step.rules else _set(f"{where}.rules=[{told}]")


def _fallback(tensors: Iterable[PlannedTensor]) -> str | None:
    """The largest codec that llama.cpp stores any of these in instead; None where all fit, or it has none."""
    pairs = [(t, ggml_fallback(t.codec, t.spec.shape[-1])) for t in tensors]
    found = [nearest_codec(replace(t, codec=used, wanted=t.codec)) for t, used in pairs if used is not None]
    return max(found, key=lambda name: stored_bytes(name, BLOCKS), default=None)


def _scheme(codec: str) -> str | None:
    """The scheme that is integers in groups of so many columns; None for other codecs."""
    info = codec_info(codec)
    if info.kind != "uniform" or not info.block:
        return None
    return f"W{info.bits}A16_G{info.block}{'' if info.symmetric else '_ASYM'}"


def _set(option: str) -> str:
    return f"--set '{option}'"


def _rule(roles: Iterable[str], codec: str) -> str:
    names = list(roles)
    return f"{{targets: {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}, codec: {codec}}}"


def _fewer_columns(codec: str, columns: Sequence[int]) -> str | None:
    """The codec with the same codes and the largest group that divides all these rows, or one scale a row; None for codecs
    without groups."""
    info = codec_info(codec)
    if info.kind != "uniform":
        return None
    return smaller_group(codec, columns) or f"int{info.bits}-row{'' if info.symmetric else '-asym'}"


def nearest_codec(planned: PlannedTensor) -> str:
    """What a recipe may name for a tensor that falls back: what it falls to, or the smallest codec of as many bits that its
    rows fit."""
    used, wanted = codec_info(planned.codec), codec_info(planned.wanted or planned.codec)
    if not used.fallback_only:
        return used.name
    columns = planned.spec.shape[-1]
    fitting = [n for n in FIXED_NAMES if codec_info(n).kind == used.kind and fits(n, columns)]
    large = [n for n in fitting if row_bytes(n, columns) * wanted.block >= wanted.block_bytes * columns]
    return min(large or fitting, key=lambda name: row_bytes(name, columns))
