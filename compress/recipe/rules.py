"""Which rule of a recipe decides about which tensor: semantic roles, layer ranges, `re:` patterns.

A target is a role (`routed_experts.down`), a group of roles (`routed_experts`, `attention`) or `re:PATTERN` (patterns.py),
matched from the start of the checkpoint's tensor name, with or without its `.weight`. The first matching rule
wins.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.codecs.names import codec_info
from compress.limits import LAYERS, MOST_TARGETS
from compress.reading import in_words
from compress.recipe.patterns import PatternError, compiled
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS, FactorizerOptions, PrunerOptions, SolverOptions
from compress.weights import Pattern

if TYPE_CHECKING:
    from compress.models.spec import TensorSpec

ROLES: tuple[str, ...] = (
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "qkv", "gate", "q_a", "q_b", "kv_a", "kv_b")),
    *(f"{group}.{part}" for group in ("mlp", "routed_experts", "shared_experts") for part in ("gate", "up", "down")),
    "router",
    "embeddings",
    "lm_head",
    "norms",
    "biases",
    "small",
    "mtp",
)
"""Every role that a rule can name."""

GROUPS: tuple[str, ...] = ("attention", "mlp", "routed_experts", "shared_experts")
"""Targets that stand for all roles below them."""

LINEARS: tuple[str, ...] = GROUPS
"""What steps that shrink linears work on where a recipe names no targets: not the head, not the embeddings."""

FLOAT_ROLES: tuple[str, ...] = ("router", "norms", "biases", "small")
"""Roles that are never quantized: they are tiny (small: convolutions, decays and the like), and every engine expects floats
there."""

_LAYERS = re.compile(
    r"(?P<low>\d{1,9})(\s*-\s*(?P<high>\d{1,9}))?|(?P<end>first|last)\s+(?P<num>\d{1,9})(\s*/\s*(?P<den>\d{1,9}))?",
    re.ASCII,
)
LAYERS_HELP = "a layer ('5'), a range ('0-3'), 'first 4', 'last 4', a fraction ('first 1/8', 'last 1/4'), or a list"


def problem(message: str) -> PydanticCustomError:
    """A validation error that reads exactly as `message`."""
    return PydanticCustomError("recipe", "{message}", {"message": message})


def nearest(name: str, names: Iterable[str], count: int = 2) -> str:
    """'; nearest: a, b' or, when nothing is near, '; one of: ...'; ignores case."""
    names = list(names)
    near = closest(name, names, count)
    return (
        f"; nearest: {', '.join(near)}"
        if near
        else f"; one of: {', '.join({found.lower(): found for found in names}.values())}"
    )


def closest(name: str, names: Iterable[str], count: int = 2) -> list[str]:
    """The names that are most like `name`, the likest first; none where none is near. Ignores case."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(str(name)[:64].lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[found] for found in near]


def check_target(target: str) -> str:
    """Returns `target`; raises when it is no role, group or valid pattern."""
    if target.startswith("re:"):
        try:
            compiled(target[3:])
        except PatternError as error:
            raise problem(f"{in_words(target)} is not a valid regular expression: {error}") from None
    elif target not in ROLES and target not in GROUPS:
        raise problem(f"unknown role {in_words(target)}{nearest(target, ROLES + GROUPS)}, or a pattern 're:...'")
    return target


def check_codec(codec: str) -> str:
    """The canonical name of a codec a recipe may ask for; raises with the nearest names."""
    try:
        info = codec_info(codec)
    except KeyError as error:
        raise problem(error.args[0]) from None
    if info.fallback_only:
        raise problem(f"{info.name} exists only as llama.cpp's fallback for rows that do not divide by 256")
    if info.derived:
        raise problem(
            f"{info.name} is what a prune or factorize step makes of a codec; name {info.parts[-1]} and the step"
        )
    return info.name


def check_layers(layers: Any) -> str:
    """Returns one item of `layers:` in normal form; raises when it is not of the grammar of `LAYERS_HELP`."""
    text = str(layers).strip().lower()
    match = _LAYERS.fullmatch(text) if isinstance(layers, str | int) and not isinstance(layers, bool) else None
    if match is None:
        raise problem(f"{in_words(layers)} names no layers; expected {LAYERS_HELP}")
    if max(int(number) for key in ("low", "high", "num", "den") if (number := match[key])) > LAYERS:
        raise problem(f"{layers!r} is beyond {LAYERS} layers, more than any model here may have")
    if match["high"] and int(match["high"]) < int(match["low"]):
        raise problem(f"{layers!r} is an empty range; write the smaller layer first")
    if match["den"] is not None and not 0 < int(match["num"]) <= int(match["den"]):
        raise problem(f"{layers!r} must be a fraction between 0 and 1")
    return text


def layer_set(layers: Sequence[str], count: int) -> frozenset[int]:
    """The layers of a model with `count` of them that `layers` names; those beyond the model are dropped.

    Fractions round down, but to one layer at least.
    """
    chosen: set[int] = set()
    for item in layers:
        match = _LAYERS.fullmatch(item)
        assert match is not None, item
        if match["low"] is not None:
            chosen.update(range(int(match["low"]), int(match["high"] or match["low"]) + 1))
        else:
            size = int(match["num"])
            if match["den"] is not None:
                size = max(1, count * size // int(match["den"]))
            chosen.update(range(size) if match["end"] == "first" else range(max(0, count - size), count))
    return frozenset(layer for layer in chosen if layer < count)


def _among(known: Mapping[str, type[BaseModel]]) -> Callable[[Any], Any]:
    """`gptq` or `{name: gptq, damping: 0.03}` to the option class of that name."""

    def chosen(value: Any) -> Any:
        if isinstance(value, tuple(known.values())):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise problem(f"expected a solver's name or {{name: ..., option: value}}, got {in_words(value)}")
        name = value["name"].lower()
        if name not in known:
            raise problem(f"unknown solver {in_words(value['name'])}{nearest(name, known)}")
        return known[name].model_validate({**value, "name": name})

    return chosen


def _pattern(value: Any) -> Any:
    """0.5 or '2:4' to a Pattern."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return Pattern(float(value))
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", value) if isinstance(value, str) else None
    if match is None:
        raise problem(
            f"expected a share between 0 and 1 of what goes, or n:m of what stays (2:4), got {in_words(value)}"
        )
    keep, of = int(match[1]), int(match[2])
    if not 0 < keep < of or of > WIDEST_GROUP or comb(of, keep) > MOST_COMBINATIONS:
        raise problem(
            f"{value} keeps {keep} of every {of} columns; n:m needs 0 < n < m <= {WIDEST_GROUP}, with no more than "
            f"{MOST_COMBINATIONS} ways to choose (any n up to m = 8)"
        )
    return Pattern.n_of_m(keep, of)


WIDEST_GROUP, MOST_COMBINATIONS = 16, 256  # of n:m, so that a byte numbers what is kept


def _listed(value: Any) -> Any:
    value = [value] if isinstance(value, str | int) and not isinstance(value, bool) else value
    if not isinstance(value, list | tuple):
        raise problem(f"expected a name or a list of names, got {in_words(value)}")
    if len(value) > MOST_TARGETS:
        raise problem(f"a list of {len(value):,} names; at most {MOST_TARGETS:,} are read")
    return tuple(value)


def _not_empty(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise problem("the list is empty")
    return value


Solver = Annotated[SerializeAsAny[SolverOptions], BeforeValidator(_among(SOLVERS))]
Pruner = Annotated[SerializeAsAny[PrunerOptions], BeforeValidator(_among(PRUNERS))]
Factorizer = Annotated[SerializeAsAny[FactorizerOptions], BeforeValidator(_among(FACTORIZERS))]
Sparsity = Annotated[
    Pattern, BeforeValidator(_pattern), PlainSerializer(lambda p: f"{p.keep}:{p.of}" if p.of else p.sparsity)
]
Ignored = Annotated[tuple[Annotated[str, AfterValidator(check_target)], ...], BeforeValidator(_listed)]
Targets = Annotated[Ignored, AfterValidator(_not_empty)]
Layers = Annotated[
    tuple[Annotated[str, BeforeValidator(check_layers)], ...],
    BeforeValidator(_listed),
    AfterValidator(_not_empty),
]


class Rule(BaseModel):
    """One line of a recipe: the tensors of `targets` (in `layers`, if given) go to `codec`.

    `solver` overrides the step's. `incoherence` codes the weight between two randomised Hadamard transforms (the default
    of the vector codecs); `activations: int8` has the engine round each token of the inputs to 8 bits, too. A codec
    that is not a float never applies to routers or 1-D tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    targets: Targets
    codec: Annotated[str, AfterValidator(check_codec)]
    layers: Layers | None = None
    solver: Solver | None = None
    incoherence: bool | None = None
    activations: Literal["int8"] | None = None

    @model_validator(mode="after")
    def _coded(self) -> Rule:
        if codec_info(self.codec).kind == "float":
            for key in ("incoherence", "activations"):
                if getattr(self, key):
                    raise problem(f"{key} goes with a codec that rounds, not with {self.codec}")
        return self

    def __str__(self) -> str:
        where = f" in layers {', '.join(self.layers)}" if self.layers else ""
        return f"{', '.join(self.targets)}{where} -> {self.codec}"


class PruneRule(BaseModel):
    """One line of a prune step: how much of the tensors of `targets` (in `layers`, if given) goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    targets: Targets
    sparsity: Sparsity
    layers: Layers | None = None

    def __str__(self) -> str:
        where = f" in layers {', '.join(self.layers)}" if self.layers else ""
        return f"{', '.join(self.targets)}{where} -> {self.sparsity} sparse"


class FactorizeRule(BaseModel):
    """One line of a factorize step: by how much the tensors of `targets` (in `layers`, if given) shrink."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    targets: Targets
    ratio: Annotated[float, Field(gt=0, lt=1)]
    layers: Layers | None = None

    def __str__(self) -> str:
        where = f" in layers {', '.join(self.layers)}" if self.layers else ""
        return f"{', '.join(self.targets)}{where} -> factors, {self.ratio:.0%} smaller"


AnyRule = Rule | PruneRule | FactorizeRule


def covers(target: str, role: str) -> bool:
    """Whether a role or group `target` includes `role`."""
    return role == target or role.startswith(target + ".")


class RuleMatcher:
    """`rules` made fast for one model of `layer_count` layers: `match(tensor)` is the first rule that
    applies.

    Decisions are cached by role and layer; only `re:` patterns are tried tensor by tensor. Tensors that
    `ignore` names match nothing, as do tensors no rule covers: both keep the checkpoint's own float type.
    """

    def __init__(self, rules: Sequence[AnyRule], layer_count: int, ignore: Sequence[str] = ()):
        self.rules = tuple(rules)
        self._float = tuple(isinstance(r, Rule) and codec_info(r.codec).kind == "float" for r in self.rules)
        self._layers = tuple(
            None if rule.layers is None else layer_set(rule.layers, layer_count) for rule in self.rules
        )
        self._ignored = _Targets(ignore)
        self._targets = tuple(_Targets(rule.targets) for rule in self.rules)
        self._cache: dict[tuple[str, int | None, bool], tuple[int, ...]] = {}
        self._used: set[int] = set()

    def match(self, tensor: TensorSpec) -> Any:
        """The rule that decides about `tensor`, of the kind that was given, or None."""
        flat = len(tensor.shape) != 2
        key = (tensor.role, tensor.layer, flat)
        candidates = self._cache.get(key)
        if candidates is None:
            candidates = self._cache[key] = self._candidates(*key)
        if self._ignored.patterns and self._ignored.by_name(tensor.name):
            return None
        for index in candidates:
            if self._targets[index].by_role(tensor.role) or self._targets[index].by_name(tensor.name):
                self._used.add(index)
                return self.rules[index]
        return None

    @property
    def reads_names(self) -> bool:
        """Whether any pattern is tried, so that tensors of one role may be told apart."""
        return bool(self._ignored.patterns) or any(targets.patterns for targets in self._targets)

    def unused(self) -> tuple[AnyRule, ...]:
        """The rules that decided about no tensor so far, in order."""
        return tuple(rule for index, rule in enumerate(self.rules) if index not in self._used)

    def _candidates(self, role: str, layer: int | None, flat: bool) -> tuple[int, ...]:
        """Rules that may match such a tensor, up to the first that surely does."""
        if self._ignored.by_role(role):
            return ()
        found: list[int] = []
        for index, targets in enumerate(self._targets):
            layers = self._layers[index]
            if layers is not None and layer not in layers:
                continue
            if (flat or role in FLOAT_ROLES) and not self._float[index]:
                continue
            if targets.by_role(role):
                return (*found, index)
            if targets.patterns:
                found.append(index)
        return tuple(found)


class _Targets:
    """A list of targets, split into roles and compiled patterns."""

    def __init__(self, targets: Sequence[str]):
        self.roles = tuple(target for target in targets if not target.startswith("re:"))
        self.patterns = tuple(compiled(target[3:]) for target in targets if target.startswith("re:"))

    def by_role(self, role: str) -> bool:
        return any(covers(target, role) for target in self.roles)

    def by_name(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(begins(module) or begins(name) for begins in self.patterns)


def match(rules: Sequence[Rule], tensor: TensorSpec, layers: int) -> Rule | None:
    """The first of `rules` that decides about `tensor` in a model of `layers` layers; for many tensors,
    RuleMatcher.
    """
    return RuleMatcher(rules, layers).match(tensor)
