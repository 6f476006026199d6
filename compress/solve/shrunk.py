"""One tensor pruned or factorised, in whatever codec its numbers are: where pruners, factorizers, solvers and codecs meet.

Both approximate the same target under the same gram as a plain solve does. Codes are chosen with the mask (sparsegpt),
or with the mask given, in the same error feedback; of factors the dictionary is rounded first, and the coefficients are
solved again for the dictionary that ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.codecs import block_codec, float_codec, get_codec, sparse_codec
from compress.codecs.factors import join
from compress.codecs.names import codec_info
from compress.errors import CheckpointError
from compress.solvers.base import Solution, damped_gram, relative_error
from compress.solvers.options import SolverOptions
from compress.weights import Factors, Packed

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor

RIDGE = 1e-6  # of the gram that rounded atoms see, as a fraction of its mean diagonal
ROWS_RIDGE = 1e-3  # the same for rounded coefficients, some of whose atoms hardly any row uses
ROUNDS = 3  # of rounding both factors; the second gains most, 4 to 6% of the error at 4 bits


@dataclass(frozen=True)
class Shrunk:
    """packed: what ships; dense: what it computes, float32 [m, n]; damping, retries: the largest of its solves; error:
    relative, under the gram."""

    packed: Packed
    dense: Tensor
    damping: float
    retries: int
    error: float


def prune_tensor(planned: PlannedTensor, target: Tensor, gram: Tensor) -> Shrunk:
    """target: float32 [R, n]; gram: [n, n]. Raises CheckpointError when a value does not fit into a float codec."""
    options, pattern, solver = planned.pruner, planned.pattern, planned.solver
    assert options is not None and pattern is not None
    pruner = options.implementation
    if solver is None:
        masked = pruner.prune(target, gram, pattern, options)
        mask, inner, solved = masked.mask, as_floats(planned.name, planned.values, masked.values), masked
    else:
        codec = block_codec(planned.values, target.shape[1])
        if planned.compensates and options.joint:
            solved = pruner.prune_and_quantize(target, gram, codec, options, solver, pattern)
        else:
            masked = pruner.prune(target, gram, pattern, options)
            wanted = target if planned.compensates else masked.values
            solved = _solve(wanted, gram, planned.values, solver, masked.mask)
        mask, inner = solved.mask, solved.pack()
    info = codec_info(planned.codec)
    packed = sparse_codec(planned.codec).pack(inner, mask) if info.has_mask else inner
    dense = get_codec(packed.codec).unpack(packed)
    return Shrunk(packed, dense, solved.damping, solved.retries, relative_error(target, dense, gram.float()))


def factorize_tensor(planned: PlannedTensor, target: Tensor, gram: Tensor) -> Shrunk:
    """target: float32 [m, n]; gram: [n, n]. Raises CheckpointError when a value does not fit into a float codec."""
    options, sizes = planned.factorizer, planned.factors
    assert options is not None and sizes is not None
    factors = options.implementation.factorize(target, gram, *sizes, options)
    first, second = codec_info(planned.codec).parts
    damping, retries = factors.damping, factors.retries
    if planned.solver is None:
        dictionary = as_floats(planned.name, first, factors.dictionary)
        coefficients = _stored(planned.name, second, factors.coefficients, factors.mask)
    else:
        atoms, rows = _solve_factors(target, gram, factors, first, second, planned.solver)
        dictionary, coefficients = atoms.pack(), rows.pack()
        if rows.mask is not None:
            coefficients = sparse_codec(second).pack(coefficients, rows.mask)
        damping = max(damping, atoms.damping, rows.damping)
        retries = max(retries, atoms.retries, rows.retries)
    packed = join(planned.codec, tuple(target.shape), dictionary.parts, coefficients.parts)
    dense = get_codec(packed.codec).unpack(packed)
    return Shrunk(packed, dense, damping, retries, relative_error(target, dense, gram.float()))


def _solve(weight: Tensor, gram: Tensor, codec: str, options: SolverOptions, mask: Tensor | None = None) -> Solution:
    return options.implementation.solve(weight, gram, block_codec(codec, weight.shape[1]), options, mask=mask)


def _solve_factors(
    target: Tensor, gram: Tensor, factors: Factors, first: str, second: str, options: SolverOptions
) -> tuple[Solution, Solution]:
    """Codes of the dictionary and of the coefficients, in turns, each solved for the other as it is rounded; the best of
    ROUNDS. A solver without error feedback cannot make up for the mask: there the factors' own coefficients compete."""
    inner = codec_info(second).parts[0] if factors.mask is not None else second
    wanted, best = factors.dictionary, None
    for _ in range(ROUNDS):
        atoms = _solve(wanted, gram, first, options)
        dense, seen = _for_atoms(target, atoms.decode(), gram)
        tries = [dense] if options.feedback or best is not None else [dense, factors.coefficients]
        found = []
        for coefficients in tries:
            rows = _solve(coefficients, seen, inner, options, factors.mask)
            found.append((relative_error(target, rows.decode() @ atoms.decode(), gram.float()), atoms, rows))
        lost = min(found, key=lambda f: f[0])
        if best is not None and lost[0] >= best[0]:
            break
        best = lost
        wanted = _for_rows(target, best[2].decode())
    assert best is not None
    return best[1], best[2]


def _for_atoms(target: Tensor, dictionary: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The dense coefficients [m, k] that serve a dictionary best, and the gram [k, k] of what they are multiplied with."""
    wide = gram.double()
    turned = dictionary.double() @ wide
    seen = turned @ dictionary.double().T
    damped = damped_gram(seen, RIDGE)[0]
    return torch.linalg.solve(damped, turned @ target.double().T).T.float(), seen.float()


def _for_rows(target: Tensor, coefficients: Tensor) -> Tensor:
    """The dictionary [k, n] that serves coefficients best, whatever the inputs: least squares."""
    seen = damped_gram(coefficients.T @ coefficients, ROWS_RIDGE)[0]
    return torch.linalg.solve(seen, coefficients.T.double() @ target.double()).float()


def as_floats(name: str, codec: str, values: Tensor) -> Packed:
    """A tensor rounded to a float codec. Raises CheckpointError if it overflows."""
    packed = float_codec(codec).encode(values)
    if not torch.isfinite(packed.parts["values"]).all():
        raise CheckpointError(
            f"{name} does not fit into {codec}: it holds values up to "
            f"{float(values.abs().max()):.3g}; choose bf16 or f32 for it"
        )
    return packed


def _stored(name: str, codec: str, values: Tensor, mask: Tensor | None) -> Packed:
    """Float coefficients, sparse where there is a mask."""
    if mask is None:
        return as_floats(name, codec, values)
    return sparse_codec(codec).pack(as_floats(name, codec_info(codec).parts[0], values), mask)
