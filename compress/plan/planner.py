"""What becomes of every tensor of a model: each kind of tensor is decided once, whatever the number of layers and experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from compress.containers import Container
from compress.models.checkpoint import Checkpoint
from compress.models.spec import ModelSpec, TensorSpec
from compress.plan.checks import tensor_problems
from compress.plan.tensor import PlannedTensor, Rules, in_pieces, packed_bytes, planned_tensor, precise_float
from compress.recipe.rules import FLOAT_ROLES, RuleMatcher
from compress.recipe.schema import Recipe

MATCHING = ("quantize", "prune", "factorize")  # steps whose rules decide tensor by tensor


@dataclass(frozen=True)
class Decided:
    """Every tensor of a model, its bytes counted; rules of the recipe that match none; why some cannot be stored."""

    tensors: tuple[PlannedTensor, ...]
    unused: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Planner:
    """A recipe on a checkpoint. own: the checkpoint's float codec."""

    recipe: Recipe
    checkpoint: Checkpoint
    own: str

    @cached_property
    def containers(self) -> Sequence[Container]:
        return self.recipe.containers

    def decide(self, spec: ModelSpec) -> Decided:
        """Every tensor of a model."""
        decisions = _Decisions(self, spec)
        tensors, problems = [], []
        for tensor in spec.tensors():
            planned = decisions.of(tensor)
            if id(planned) in decisions.faulty:
                problems += decisions.problems(replace(planned, spec=tensor))
            tensors.append(planned if planned.spec is tensor else replace(planned, spec=tensor))
        return Decided(tuple(tensors), decisions.unused(), tuple(problems))

    def sketch(self, spec: ModelSpec) -> Sketch:
        """What there is to know of a model without listing it."""
        return Sketch(self, spec)


class Sketch:
    """A model by its kinds of tensor and of block."""

    def __init__(self, planner: Planner, spec: ModelSpec):
        self.planner, self.spec, self._decisions = planner, spec, _Decisions(planner, spec)
        self.counts: dict[int, tuple[PlannedTensor, int]] = {}
        """Tensors that are decided alike: one of them, and how many there are."""
        self._blocks: dict[tuple[int, ...], int] = {}
        for tensor in spec.outer:
            self._count(tensor, 1)
        for layer in range(spec.layers):
            alike = tuple(self._count(tensor, count) for tensor, count in self._samples(layer))
            self._blocks.setdefault(alike, layer)

    def _samples(self, layer: int) -> Iterator[tuple[TensorSpec, int]]:
        for branch in self.spec.branches(layer):
            yield from ((t, 1) for t in branch.tensors) if self._decisions.by_name else branch.samples

    def _count(self, tensor: TensorSpec, count: int) -> int:
        planned = self._decisions.of(tensor)
        self.counts[id(planned)] = (planned, count + self.counts.get(id(planned), (planned, 0))[1])
        return id(planned)

    def size(self, container: Container) -> int:
        """Bytes of all tensors in a container."""
        return sum(count * container.tensor_bytes(t, self.planner.own) for t, count in self.counts.values())

    @property
    def sound(self) -> bool:
        """Whether all its tensors can be stored, each by itself."""
        return not self._decisions.faulty

    def one_of_each(self) -> list[PlannedTensor]:
        """The tensors outside the blocks, and those of one block of each kind."""
        tensors = [*self.spec.outer, *(t for n in self._blocks.values() for t in self.spec.block_tensors(n))]
        return [replace(self._decisions.of(t), spec=t) for t in tensors]


class _Decisions:
    """The tensors of one model, by what decides about them."""

    def __init__(self, planner: Planner, spec: ModelSpec):
        self.planner, self.spec = planner, spec
        steps = {kind: planner.recipe.step(kind) for kind in MATCHING}
        self.steps = {kind: step for kind, step in steps.items() if step is not None}
        self.matchers: dict[str, RuleMatcher] = {kind: step.matcher(spec) for kind, step in self.steps.items()}
        self.by_name = any(matcher.reads_names for matcher in self.matchers.values())
        self.faulty: set[int] = set()
        self._made: dict[Any, PlannedTensor] = {}
        self._experts: dict[Any, PlannedTensor] = {}

    def of(self, tensor: TensorSpec) -> PlannedTensor:
        """What becomes of a tensor, as that of another one which is decided alike."""
        alike = None
        if tensor.expert is not None and not self.by_name:
            alike = (tensor.layer, tensor.role, tensor.declared.gguf)
            if alike in self._experts:
                return self._experts[alike]
        rules = {kind: rule for kind, m in self.matchers.items() if (rule := m.match(tensor)) is not None}
        codec = rules["quantize"].codec if "quantize" in rules else self._unmatched(tensor)
        ids = tuple(id(rules.get(kind)) for kind in MATCHING)
        key = (ids, codec, tensor.role, tensor.shape, tensor.declared.gguf, tensor.input is None)
        planned = self._made.get(key)
        if planned is None:
            planned = self._made[key] = self._decide(tensor, codec, rules)
        if alike is not None:
            self._experts[alike] = planned
        return planned

    def _decide(self, tensor: TensorSpec, codec: str, rules: dict[str, Any]) -> PlannedTensor:
        containers, own = self.planner.containers, self.planner.own
        found = Rules(**{kind: (self.steps[kind], rule) for kind, rule in rules.items()})
        planned = in_pieces(planned_tensor(self.spec, tensor, codec, found, containers), own, containers)
        problems = self.problems(planned)
        if not problems:
            planned = replace(planned, bytes=packed_bytes(planned, containers, own))
        else:
            self.faulty.add(id(planned))
        return planned

    def problems(self, planned: PlannedTensor) -> list[str]:
        """Why a tensor cannot be stored as planned."""
        found = tensor_problems(planned, self.planner.containers)
        shrinking = [self.matchers[kind] for kind in ("prune", "factorize") if kind in self.matchers]
        if len(shrinking) == 2 and all(matcher.match(planned.spec) for matcher in shrinking):
            found.insert(0, f"{planned.spec.role}: prune and factorize both name it; factors have a mask already")
        return found

    def unused(self) -> tuple[str, ...]:
        """Rules of the recipe that match no tensor."""
        return tuple(
            str(rule) for kind, m in self.matchers.items() for rule in m.unused() if rule in self.steps[kind].rules
        )

    def _unmatched(self, tensor: TensorSpec) -> str:
        """No rule: the checkpoint's own float type, float32 for what engines want in float32."""
        entry, own = self.planner.checkpoint.entries.get(tensor.name), self.planner.own
        codec = (entry.codec if entry else None) or own
        precise = precise_float(self.planner.containers) if tensor.role in FLOAT_ROLES else None
        return precise or codec
