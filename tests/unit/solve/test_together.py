"""Tensors of a layer solved together get what each gets alone, in groups that respect inputs, codecs and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.models.spec import TensorSpec
from compress.plan.tensor import PlannedTensor
from compress.solve.tensor import Outcome, solve_tensor
from compress.solve.together import Task, problem_bytes, solve_together, stacks_of
from compress.solvers.options import GptqOptions, RtnOptions
from compress.statistics import Statistics
from compress.weights import Pattern

N = 256


def planned(name: str, rows: int, given: str | None, codec: str = "q2_k", **changes: object) -> PlannedTensor:
    spec = TensorSpec(f"model.layers.0.{name}.weight", (rows, N), "mlp.up", 0, None, f"blk.0.{name}.weight", given)
    solver = changes.pop("solver", GptqOptions())
    return replace(PlannedTensor(spec, codec, solver, 0, values=codec), **changes)  # type: ignore[arg-type]


def statistics(seed: int) -> Statistics:
    """With drift, so that targets are not the weights."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(600, N, generator=random) @ (torch.randn(N, N, generator=random) / 16)
    gap = 0.05 * torch.randn(600, N, generator=random)
    return Statistics(x.T @ x / 600, gap.T @ x / 600, None, 600)


def weight(rows: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(rows, N, generator=torch.Generator().manual_seed(seed))


EXPERTS = [planned(f"experts.{e}.{leaf}", 32, f"experts.{e}.in") for e in range(5) for leaf in ("gate", "up")]


def names(stacks: list[list[list[PlannedTensor]]]) -> list[list[str]]:
    """Of each stack's tensors, whichever problems they are in."""
    flat = [[planned.name for problem in stack for planned in problem] for stack in stacks]
    return [[name.removeprefix("model.layers.0.").removesuffix(".weight") for name in stack] for stack in flat]


@pytest.mark.parametrize(("codec", "incoherence"), [("q2_k", False), ("int4-g64-asym", False), ("e8p", True)])
def test_together_is_as_each_alone(codec: str, incoherence: bool) -> None:
    lines = [replace(p, codec=codec, values=codec, incoherence=incoherence) for p in EXPERTS[:4]]
    seen = {f"experts.{e}.in": statistics(e) for e in range(2)}
    tasks = [Task(p, weight(32, i), seen[p.spec.input or ""]) for i, p in enumerate(lines)]
    together = solve_together([tasks[:2], tasks[2:]], seed=7)
    for task, found in zip(tasks, together, strict=True):
        alone = solve_tensor(task.planned, task.weight, task.statistics, seed=7)
        assert isinstance(found, Outcome) and found.report == alone.report, "seconds aside"
        parts, own = found.pack().parts, alone.pack().parts
        assert parts.keys() == own.keys() and all(torch.equal(parts[name], own[name]) for name in own)
    assert not torch.equal(together[0].dense(), together[1].dense())


def test_what_shares_an_input_stays_together_and_stacks_fill_the_memory() -> None:
    memory = 2 * problem_bytes(EXPERTS[:2])
    pairs = [[f"experts.{e}.gate", f"experts.{e}.up"] for e in range(5)]
    assert names(stacks_of(EXPERTS, 1, memory)) == [pairs[0] + pairs[1], pairs[2] + pairs[3], pairs[4]]
    assert names(stacks_of(EXPERTS, 1, 0)) == pairs, "one problem is solved whatever it takes"
    assert names(stacks_of(EXPERTS, 2, 1 << 40)) == [pairs[0] + pairs[1] + pairs[2], pairs[3] + pairs[4]]
    assert len(stacks_of(EXPERTS, 8, 1 << 40)) == 5, "no core is left idle for the sake of a larger stack"


def test_experts_too_wide_to_share_a_problem_are_stacked_as_they_are() -> None:
    """Two tensors of one input are two problems then, of which a stack may have any number."""
    lines = [planned(f"experts.{e}.{leaf}", 320, f"experts.{e}.in") for e in range(3) for leaf in ("gate", "up")]
    stacks = stacks_of(lines, 2, 1 << 40)
    assert [[len(problem) for problem in stack] for stack in stacks] == [[1, 1, 1], [1, 1, 1]]
    seen = {f"experts.{e}.in": statistics(e) for e in range(3)}
    tasks = [Task(p, weight(320, i), seen[p.spec.input or ""]) for i, p in enumerate(lines[:3])]
    for task, found in zip(tasks, solve_together([[task] for task in tasks]), strict=True):
        alone = solve_tensor(task.planned, task.weight, task.statistics).pack().parts
        assert all(torch.equal(part, alone[name]) for name, part in found.pack().parts.items())


def test_what_differs_is_solved_apart() -> None:
    others = [
        planned("down", 32, "act"),
        planned("wide", 64, "act"),  # of the same input: one problem with it, of another shape than the rest
        planned("finer", 32, "experts.0.in", "q4_k"),
        planned("rounded", 32, "experts.0.in", solver=RtnOptions()),
        planned("masked", 32, "experts.0.in", pattern=Pattern(0.5)),
        planned("ordered", 32, "experts.0.in", ordered=True),
        planned("shared", 32, "experts.0.in", "nf4"),
        planned("looked_up", 32, None),
        planned("sweeps", 32, "experts.0.in", solver=GptqOptions(sweeps=1)),
    ]
    groups = names(stacks_of([*EXPERTS[:4], *others], 1, 1 << 40))
    assert groups[0] == ["experts.0.gate", "experts.0.up", "experts.1.gate", "experts.1.up"]
    assert ["down", "wide"] in groups
    assert sorted(groups[2:]) == [[name] for name in sorted(p.spec.name.split(".")[3] for p in others[2:])]
