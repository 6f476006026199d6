"""One tensor: from its float weight to what ships, and back. Here transforms, solvers and codecs meet; `shrunk` has what
is pruned or factorised.

Codecs made for it (and any other whose rule says `incoherence`) are solved in incoherent space: the weight between
two randomised Hadamard transforms, the gram of its inputs turned with it. The signs ship beside the codes.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.decode import decode, in_checkpoint_order
from compress.models.spec import TensorSpec
from compress.solve.shrunk import Shrunk, as_floats, factorize_tensor, prune_tensor
from compress.solvers.base import Solution, energy
from compress.solvers.options import Asks
from compress.statistics import Statistics, corrected_target
from compress.transforms.incoherence import Incoherence, pack_signs
from compress.weights import Packed

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor


@dataclass(frozen=True)
class Solved:
    """How one tensor came out: relative gram-weighted error, damping used, tokens seen, share borrowed, its squared output over
    all those tokens, which weighs its error among others, and the seconds that it took, beside others at the same time."""

    name: str
    codec: str
    solver: str
    error: float
    damping: float = 0.0
    retries: int = 0
    tokens: int | None = None
    borrowed: float = 0.0
    energy: float = 0.0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Outcome:
    """A solved tensor: its codes and scales, the space they live in, and how well it went."""

    solution: Solution
    incoherence: Incoherence | None
    report: Solved
    order: Tensor | None = None
    """int64 [n]: the checkpoint's column at every place of the codes, where these have another order."""

    def dense(self) -> Tensor:
        """What an engine computes with: float32 [m, n]."""
        return self.restore(self.solution.decode())

    def restore(self, values: Tensor) -> Tensor:
        """Decoded values [m, n] in the checkpoint's space and order."""
        if self.order is not None:
            return in_checkpoint_order(values, self.order)
        return values if self.incoherence is None else self.incoherence.restore(values)

    def pack(self) -> Packed:
        """The bytes that ship."""
        packed = self.solution.pack()
        if self.order is not None:
            return Packed(packed.codec, packed.shape, {**packed.parts, "columns": self.order.int()})
        if self.incoherence is None:
            return packed
        signs = {
            "signs_in": pack_signs(self.incoherence.signs_in),
            "signs_out": pack_signs(self.incoherence.signs_out),
        }
        return Packed(packed.codec, packed.shape, {**packed.parts, **signs})


@dataclass(frozen=True)
class Shipped:
    """A pruned or factorised tensor, which nothing tunes any more."""

    packed: Packed
    report: Solved

    def dense(self) -> Tensor:
        """What an engine computes with: float32 [m, n]."""
        return decode(self.packed)

    def pack(self) -> Packed:
        """The bytes that ship."""
        return self.packed


def as_stored(planned: PlannedTensor, weight: Tensor) -> Packed:
    """A tensor that no solver touches, rounded to its float codec. Raises CheckpointError if it overflows."""
    return as_floats(planned.name, planned.codec, weight)


def solve_tensor(
    planned: PlannedTensor, weight: Tensor, statistics: Statistics | None, seed: int = 0
) -> Outcome | Shipped:
    """Run one tensor's method. weight: float32 [m, n]; seed: the recipe's, from which random signs are drawn."""
    started = time.perf_counter()
    outcome = _solved(planned, weight, statistics, seed)
    seconds = round(time.perf_counter() - started, 4)
    return replace(outcome, report=replace(outcome.report, seconds=seconds))


def _solved(planned: PlannedTensor, weight: Tensor, statistics: Statistics | None, seed: int) -> Outcome | Shipped:
    if planned.pattern is not None or planned.factors is not None:
        return _shrunk(planned, weight, statistics)
    options = planned.solver
    assert options is not None
    codec = block_codec(planned.codec, weight.shape[1])
    ready = prepared(planned, weight, statistics, seed)
    solution = options.implementation.solve(ready.target, ready.gram, codec, options)
    return outcome_of(planned, solution, ready, statistics)


@dataclass(frozen=True)
class Prepared:
    """What a solver gets of a tensor: target [m, n] and gram [n, n] (None where nothing is known of its inputs), both in the space
    and order of its codes; incoherence, order: as in Outcome."""

    target: Tensor
    gram: Tensor | None
    incoherence: Incoherence | None
    order: Tensor | None


def prepared(
    planned: PlannedTensor, weight: Tensor, statistics: Statistics | None, seed: int, turned: Tensor | None = None
) -> Prepared:
    """A tensor's target and gram where its codes will be. turned: that gram, where a tensor with the same inputs has it already."""
    options = planned.solver
    assert options is not None
    gram = None if statistics is None else statistics.gram
    target = weight if statistics is None else _corrected(weight, statistics, options.asks)
    if gram is None and options.needs_gram:
        # rows that are looked up, not multiplied: plain squared error
        gram = torch.eye(weight.shape[1], device=weight.device)
    incoherence = None
    if planned.incoherence:
        rows, columns = weight.shape
        incoherence = Incoherence.draw(rows, columns, *_sign_seeds(planned.spec, seed), device=weight.device)
        target = incoherence.weight(target)
        gram = turned if turned is not None or gram is None else incoherence.gram(gram)
    order = column_order(planned)
    if order is not None:
        order = order.to(target.device)
        target = target[:, order]
        gram = None if gram is None else gram[order][:, order]
    return Prepared(target, gram, incoherence, order)


def outcome_of(planned: PlannedTensor, solution: Solution, ready: Prepared, statistics: Statistics | None) -> Outcome:
    """A solution with its report, without the seconds that it took."""
    report = _report(planned, solution, statistics, energy(ready.target, ready.gram))
    return Outcome(solution, ready.incoherence, report, ready.order)


def column_order(planned: PlannedTensor) -> Tensor | None:
    """The checkpoint's columns in the order of a container that has another, int64 [n]."""
    order = planned.spec.column_order
    return None if not planned.ordered or order is None else torch.from_numpy(order.index(planned.spec.shape[-1]))


def _shrunk(planned: PlannedTensor, weight: Tensor, statistics: Statistics | None) -> Shipped:
    gram = torch.eye(weight.shape[1], device=weight.device) if statistics is None else statistics.gram
    target = weight if statistics is None else _corrected(weight, statistics, planned.asks)
    shrunk = (prune_tensor if planned.pattern is not None else factorize_tensor)(planned, target, gram)
    return Shipped(shrunk.packed, _report(planned, shrunk, statistics, energy(target, gram)))


def _report(planned: PlannedTensor, result: Solution | Shrunk, statistics: Statistics | None, mean: float) -> Solved:
    """mean: squared output per unit weight."""
    return Solved(
        planned.name,
        planned.codec,
        planned.label or "",
        result.error,
        result.damping,
        result.retries,
        None if statistics is None else statistics.tokens,
        0.0 if statistics is None else statistics.borrowed,
        mean if statistics is None else mean * statistics.weight,
    )


def _sign_seeds(spec: TensorSpec, seed: int) -> tuple[int, int]:
    """Seeds of the input's and the output's signs: linears that read the same activations share the former, so that an
    engine transforms those once."""
    return zlib.crc32(f"{seed} {spec.layer} {spec.signs}".encode()), zlib.crc32(f"{seed} {spec.name}".encode())


def _corrected(weight: Tensor, statistics: Statistics, asks: Asks) -> Tensor:
    """The target of methods that compensate drift; the weight itself for the others."""
    return corrected_target(weight, statistics, asks.drift_damping, asks.drift, asks.residual)
