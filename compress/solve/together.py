"""Tensors of a layer solved side by side: those that share an input as one matrix, and matrices of one shape as a stack.

Linears that read the same activations have one gram: their rows, one below the other, are one problem, which factorises it once.
Problems of one shape, codec and method (a layer's experts) are a stack: every step of the solver is one operation for all. Codes
are those of each tensor alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.solve.tensor import Outcome, Prepared, Shipped, outcome_of, prepared, solve_tensor
from compress.solvers.base import Solution, relative_error
from compress.solvers.options import solve_bytes
from compress.statistics import Statistics

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor

ROWS_A_COLUMN = 2
"""Rows of a problem at most: with more, its gram weighs little beside them, and memory is better spent on one tensor."""


@dataclass(frozen=True)
class Task:
    """A tensor to be solved: its plan, weight float32 [m, n], and what its method receives, alike for all of a problem."""

    planned: PlannedTensor
    weight: Tensor
    statistics: Statistics | None


def stacks_of(tensors: Sequence[PlannedTensor], jobs: int, memory: int) -> list[list[list[PlannedTensor]]]:
    """Stacks of problems that `solve_together` takes, at least `jobs` of them where there are as many problems. A problem is tensors
    that share an input, or a single one.

    memory: bytes that a stack may take while it is solved; what a single problem takes is not asked.
    """
    problems: dict[Any, list[list[PlannedTensor]]] = {}
    alone: list[list[list[PlannedTensor]]] = []
    for planned in tensors:
        if not _stacks(planned):
            alone.append([[planned]])
            continue
        spec = planned.spec
        key = (spec.input, planned.codec, planned.solver, planned.incoherence and spec.signs, planned.incoherence)
        found = problems.setdefault(key, [[]])
        if found[-1] and sum(t.spec.shape[0] for t in found[-1]) + spec.shape[0] > ROWS_A_COLUMN * spec.shape[1]:
            found.append([])
        found[-1].append(planned)
    alike: dict[Any, list[list[PlannedTensor]]] = {}
    for members in chain.from_iterable(problems.values()):
        first, shapes = members[0], tuple(planned.spec.shape for planned in members)
        alike.setdefault((shapes, first.codec, first.solver, first.incoherence), []).append(members)
    stacks = []
    for same in alike.values():
        size = min(max(1, memory // problem_bytes(same[0])), -(-len(same) // jobs))
        stacks += [same[start : start + size] for start in range(0, len(same), size)]
    return [*stacks, *alone]


def problem_bytes(members: Sequence[PlannedTensor]) -> int:
    """About what tensors that share an input take while they are solved."""
    return solve_bytes(sum(planned.spec.shape[0] for planned in members), members[0].spec.shape[-1])


def _stacks(planned: PlannedTensor) -> bool:
    """Whether it can be solved with others: by plain error feedback, in the checkpoint's own order of columns."""
    if planned.pattern is not None or planned.factors is not None or planned.solver is None or planned.ordered:
        return False
    if not planned.solver.stacks or planned.spec.input is None:
        return False
    return block_codec(planned.codec, planned.spec.shape[-1]).stacks


def solve_together(problems: Sequence[Sequence[Task]], seed: int = 0) -> list[Outcome | Shipped]:
    """Solve one stack of `stacks_of`: an outcome a task, in their order. seed: the recipe's, from which random signs are drawn."""
    tasks = list(chain.from_iterable(problems))
    if len(tasks) == 1 or any(task.statistics is None for task in tasks):
        return [solve_tensor(task.planned, task.weight, task.statistics, seed) for task in tasks]
    started = time.perf_counter()
    ready = [_problem(members, seed) for members in problems]
    first = tasks[0].planned
    assert first.solver is not None
    weights, grams = (torch.stack(parts) for parts in zip(*((p.weight, p.gram) for p in ready), strict=True))
    codec = block_codec(first.codec, weights.shape[2])
    solutions = first.solver.implementation.solve_alike(weights, grams, codec, first.solver)
    del weights, grams
    found = [
        outcome for problem, solution in zip(ready, solutions, strict=True) for outcome in problem.outcomes(solution)
    ]
    seconds = round((time.perf_counter() - started) / len(tasks), 4)
    return [replace(outcome, report=replace(outcome.report, seconds=seconds)) for outcome in found]


@dataclass(frozen=True)
class _Problem:
    """Tensors that share an input. weight: their targets' rows, [R, n]; gram: [n, n]."""

    tasks: Sequence[Task]
    parts: Sequence[Prepared]
    weight: Tensor
    gram: Tensor

    def outcomes(self, solution: Solution) -> Iterator[Outcome]:
        """Of each tensor, from that of all their rows."""
        start = 0
        for task, part in zip(self.tasks, self.parts, strict=True):
            own, at = solution, slice(start, start + len(part.target))
            if len(self.tasks) > 1:
                own = replace(solution, units=solution.units[at], grid=solution.grid.rows(at))
                own = replace(own, error=relative_error(part.target, own.decode(), self.gram.float()))
            yield outcome_of(task.planned, own, part, task.statistics)
            start = at.stop


def _problem(tasks: Sequence[Task], seed: int) -> _Problem:
    parts, gram = [], None
    for task in tasks:  # the gram turns alike for all of them
        parts.append(prepared(task.planned, task.weight, task.statistics, seed, gram))
        gram = parts[-1].gram
    assert gram is not None
    return _Problem(tasks, parts, torch.cat([part.target for part in parts]), gram)
