"""One tensor: from its float weight to what ships, and back. Here transforms, solvers and codecs meet; `shrink` has what
is pruned or factorised.

Codecs made for it (and any other whose rule says `incoherence`) are solved in incoherent space: the weight between
two randomised Hadamard transforms, the gram of its inputs turned with it. The signs ship beside the codes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.codecs import block_codec, get_codec
from compress.models.spec import TensorSpec
from compress.solve.shrunk import Shrunk, as_floats, factorize_tensor, prune_tensor
from compress.solvers.base import Solution
from compress.statistics import Statistics, corrected_target
from compress.transforms.incoherence import Incoherence, pack_signs, unpack_signs
from compress.weights import Packed

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor


@dataclass(frozen=True)
class Solved:
    """How one tensor came out: relative gram-weighted error, damping used, tokens seen, share borrowed."""

    name: str
    codec: str
    solver: str
    error: float
    damping: float = 0.0
    retries: int = 0
    tokens: int | None = None
    borrowed: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A solved tensor: its codes and scales, the space they live in, and how well it went."""

    solution: Solution
    incoherence: Incoherence | None
    report: Solved

    def dense(self) -> Tensor:
        """What an engine computes with: float32 [m, n]."""
        values = self.solution.decode()
        return values if self.incoherence is None else self.incoherence.restore(values)

    def pack(self) -> Packed:
        """The bytes that ship."""
        packed = self.solution.pack()
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
    if planned.pattern is not None or planned.factors is not None:
        return _shrunk(planned, weight, statistics)
    options = planned.solver
    assert options is not None
    module = import_module(f"compress.solvers.{options.name}")
    codec = block_codec(planned.codec, weight.shape[1])
    gram = None if statistics is None else statistics.gram
    target = weight if statistics is None else _corrected(weight, statistics, options)
    if gram is None and module.NEEDS_GRAM:
        gram = torch.eye(
            weight.shape[1], device=weight.device
        )  # rows that are looked up, not multiplied: plain squared error
    incoherence = None
    if planned.incoherence:
        incoherence = Incoherence.draw(*weight.shape, *_sign_seeds(planned.spec, seed), device=weight.device)
        target = incoherence.weight(target)
        gram = None if gram is None else incoherence.gram(gram)
    solution = module.solve(target, gram, codec, options)
    return Outcome(solution, incoherence, _report(planned, solution, statistics))


def _shrunk(planned: PlannedTensor, weight: Tensor, statistics: Statistics | None) -> Shipped:
    gram = torch.eye(weight.shape[1], device=weight.device) if statistics is None else statistics.gram
    target = weight if statistics is None else _corrected(weight, statistics, planned.method)
    shrunk = (prune_tensor if planned.pattern is not None else factorize_tensor)(planned, target, gram)
    return Shipped(shrunk.packed, _report(planned, shrunk, statistics))


def _report(planned: PlannedTensor, result: Solution | Shrunk, statistics: Statistics | None) -> Solved:
    return Solved(
        planned.name,
        planned.codec,
        planned.label or "",
        result.error,
        result.damping,
        result.retries,
        None if statistics is None else statistics.tokens,
        0.0 if statistics is None else statistics.borrowed,
    )


def decode(packed: Packed) -> Tensor:
    """What an engine computes with: float32 of the packed shape."""
    values = get_codec(packed.codec).unpack(packed)
    if "signs_in" not in packed.parts:
        return values
    rows, columns = packed.shape
    signs_in, signs_out = unpack_signs(packed.parts["signs_in"], columns), unpack_signs(packed.parts["signs_out"], rows)
    return Incoherence(signs_in, signs_out).restore(values)


def _sign_seeds(spec: TensorSpec, seed: int) -> tuple[int, int]:
    """Seeds of the input's and the output's signs: linears that read the same activations share the former, so that an
    engine transforms those once."""
    place = (spec.input or "").rpartition(".")[2]  # "in" of every expert, "act", "out"
    return zlib.crc32(f"{seed} {spec.layer} {place}".encode()), zlib.crc32(f"{seed} {spec.name}".encode())


def _corrected(weight: Tensor, statistics: Statistics, options: object) -> Tensor:
    """The target of methods that compensate drift; the weight itself for the others."""
    drift, residual = getattr(options, "drift", 0.0), getattr(options, "residual", 0.0)
    return corrected_target(weight, statistics, getattr(options, "drift_damping", 0.1), drift, residual)
