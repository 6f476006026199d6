"""What becomes of every tensor of a model: each kind of tensor is decided once, whatever the number of layers and experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from compress.codecs.names import codec_info
from compress.containers import Container
from compress.models.checkpoint import Checkpoint
from compress.models.spec import ModelSpec, TensorSpec
from compress.plan.causes import Cures, Exchange, Problem, problem_of
from compress.plan.checks import tensor_problems
from compress.plan.outline import Outline
from compress.plan.tensor import PlannedTensor, Rules, in_pieces, packed_bytes, planned_tensor, precise_float
from compress.recipe.rules import FLOAT_ROLES, RuleMatcher
from compress.recipe.schema import Recipe

MATCHING = ("quantize", "prune", "factorize")  # steps whose rules decide tensor by tensor


@dataclass(frozen=True)
class Planner:
    """A recipe on a checkpoint. own: the checkpoint's float codec."""

    recipe: Recipe
    checkpoint: Checkpoint
    own: str

    @cached_property
    def containers(self) -> Sequence[Container]:
        return self.recipe.containers

    def decide(self, spec: ModelSpec) -> Decisions:
        """What becomes of every tensor of a model."""
        return Decisions(self, spec)


class Decisions:
    """A recipe's decisions about one model: about one tensor for all that are alike."""

    def __init__(self, planner: Planner, spec: ModelSpec):
        self.planner, self.spec = planner, spec
        steps = {kind: planner.recipe.step(kind) for kind in MATCHING}
        self._steps = {kind: step for kind, step in steps.items() if step is not None}
        self._matchers: dict[str, RuleMatcher] = {kind: step.matcher(spec) for kind, step in self._steps.items()}
        self._by_name = any(matcher.reads_names for matcher in self._matchers.values())
        self._made: dict[Any, PlannedTensor] = {}
        self._experts: dict[Any, PlannedTensor] = {}
        self.sound = True
        """Whether all tensors can be stored, each by itself."""
        self.outline = self._outline()

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why tensors cannot be stored as planned, each by itself; a line for each role and cause."""
        return (
            () if self.sound else tuple(self._cures.told([p for t in self.outline.tensors for p in self._problems(t)]))
        )

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Roles with tensors in another codec than the recipe's."""
        return self._cures.exchanged(self.outline.counted)

    @property
    def _cures(self) -> Cures:
        matcher = self._matchers.get("quantize")
        return Cures(self.planner.recipe, lambda t: None if matcher is None else matcher.match(t.spec))

    @property
    def unused(self) -> tuple[str, ...]:
        """Rules of the recipe that match no tensor."""
        return tuple(
            str(rule) for kind, m in self._matchers.items() for rule in m.unused() if rule in self._steps[kind].rules
        )

    def _outline(self) -> Outline:
        kinds: dict[Any, int] = {}
        kind_of = []
        for layer, block in enumerate(self.spec.blocks):
            alike = tuple(id(self._decided(tensor)) for tensor in self._samples(layer))
            # names as long: what a file's list of tensors takes is the same, too
            kind_of.append(kinds.setdefault((block, alike, len(str(layer))), len(kinds)))
        firsts = [kind_of.index(kind) for kind in kinds.values()]
        outer, beside, *inside = (
            tuple(replace(self._decided(t), spec=t) for t in tensors)
            for tensors in (self.spec.outer, self.spec.beside, *map(self.spec.block_tensors, firsts))
        )
        return Outline(self.spec, outer, tuple(inside), tuple(kind_of), beside)

    def _samples(self, layer: int) -> Iterator[TensorSpec]:
        """Tensors of a block, those of one expert for all of them where no rule tells them apart."""
        for branch in self.spec.branches(layer):
            yield from branch.tensors if self._by_name else branch.samples

    def _decided(self, tensor: TensorSpec) -> PlannedTensor:
        """What becomes of a tensor, as that of another one which is decided alike."""
        alike = None
        if tensor.expert is not None and not self._by_name:
            alike = (tensor.layer, tensor.role, tensor.declared.gguf)
            if alike in self._experts:
                return self._experts[alike]
        matchers = self._matchers_of(tensor)
        rules = {kind: rule for kind, m in matchers.items() if (rule := m.match(tensor)) is not None}
        codec = rules["quantize"].codec if "quantize" in rules else self._unmatched(tensor)
        ids = tuple(id(rules.get(kind)) for kind in MATCHING)
        key = (ids, codec, tensor.role, tensor.shape, tensor.declared.gguf, tensor.input is None, tensor.beside)
        planned = self._made.get(key)
        if planned is None:
            planned = self._made[key] = self._decide(tensor, codec, rules)
        if alike is not None:
            self._experts[alike] = planned
        return planned

    def _matchers_of(self, tensor: TensorSpec) -> Mapping[str, RuleMatcher]:
        """The steps whose rules reach a tensor: what has no inputs to be weighed by is rounded at most."""
        if tensor.carried:
            return {}
        return {kind: m for kind, m in self._matchers.items() if kind == "quantize" or not tensor.beside}

    def _decide(self, tensor: TensorSpec, codec: str, rules: dict[str, Any]) -> PlannedTensor:
        containers, own = self.planner.containers, self.planner.own
        found = Rules(**{kind: (self._steps[kind], rule) for kind, rule in rules.items()})
        beside = self._columns(tensor)
        planned = in_pieces(planned_tensor(self.spec, tensor, codec, found, containers, beside), own, containers)
        if self._problems(planned):
            self.sound = False
            return planned
        return replace(planned, bytes=packed_bytes(planned, containers, own))

    def _columns(self, tensor: TensorSpec) -> frozenset[int]:
        """Columns of the tensors whose groups have to be as long as this one's: of those that engines multiply together, or of
        all that are quantized where a container has one length of groups."""
        if any(container.one_group for container in self.planner.containers):
            return self._quantized_columns
        together, layer = tensor.declared.fused, tensor.layer
        if layer is None or together is None:
            return frozenset()
        samples = self.spec.branches(layer)[tensor.part].samples
        return frozenset(t.shape[-1] for t in samples if t.declared.fused == together)

    @cached_property
    def _quantized_columns(self) -> frozenset[int]:
        """Columns of all tensors that the recipe gives integers in groups."""
        matcher = self._matchers.get("quantize")
        tensors = (t for layer, _ in enumerate(self.spec.blocks) for t in self._samples(layer))
        rules = ((t, matcher.match(t)) for t in tensors) if matcher else ()
        return frozenset(t.shape[-1] for t, rule in rules if rule is not None and codec_info(rule.codec).is_integer)

    def _problems(self, planned: PlannedTensor) -> list[Problem]:
        """Why a tensor cannot be stored as planned."""
        found = tensor_problems(planned, self.planner.containers)
        shrinking = [self._matchers[kind] for kind in ("prune", "factorize") if kind in self._matchers]
        if len(shrinking) == 2 and all(matcher.match(planned.spec) for matcher in shrinking):
            found.insert(0, problem_of(planned, "prune and factorize both name it; factors have a mask already"))
        return found

    def _unmatched(self, tensor: TensorSpec) -> str:
        """No rule: the checkpoint's own float type, float32 for what engines want in float32."""
        entry, own = self.planner.checkpoint.entries.get(tensor.name), self.planner.own
        codec = (entry.codec if entry else None) or own
        precise = precise_float(self.planner.containers) if tensor.role in FLOAT_ROLES else None
        return precise or codec
