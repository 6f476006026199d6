"""Steps of sparse coding that factorizers share: a first dictionary, a support, and least squares on either side.

Everything is float64 and in the white basis (`whitening.py`): target [m, n], dictionary [k, n], coefficients [m, k],
mask bool [m, k], error `|target - coefficients dictionary|^2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.solvers.base import damped_gram

CONVERGED = 1e-8  # a row's gradient, relative to that at zero; the error is off by its square
MOST_STEPS = 100


def check_sizes(weight: Tensor, k: int, s: int) -> None:
    """Raises ValueError unless 1 <= s <= k <= n: an orthonormal dictionary has at most n atoms."""
    if not 1 <= s <= k <= weight.shape[1]:
        raise ValueError(f"{s} coefficients of {k} atoms do not fit a matrix of {weight.shape[1]} columns")


def squared_error(target: Tensor, dictionary: Tensor, coefficients: Tensor) -> float:
    return float((target - coefficients @ dictionary).square().sum())


def principal_axes(target: Tensor, k: int) -> Tensor:
    """The k leading right singular vectors, [k, n] with orthonormal rows, k <= n; beyond the rank, any completion."""
    return torch.linalg.svd(target, full_matrices=k > min(target.shape))[2][:k]


def strongest(values: Tensor, s: int) -> Tensor:
    """Mask of the s largest magnitudes of every row; bool, shaped like values [m, k]."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.abs().topk(s, dim=1).indices, True)


def solve_dictionary(target: Tensor, coefficients: Tensor, ridge: float) -> Tensor:
    """The D [k, n] of least `|target - C D|^2 + mu |D|^2`; mu is `ridge` times the mean diagonal of C^T C."""
    normal = damped_gram(coefficients.T @ coefficients, ridge)[0]
    return torch.cholesky_solve(coefficients.T @ target, torch.linalg.cholesky(normal))


def solve_coefficients(target: Tensor, dictionary: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Every row's least squares over its own support, by conjugate gradients from `start` [m, k], zero off the mask.

    All rows step together, each with its own step length, so that no support is gathered into a system of its own; the
    diagonal preconditions. No row's error rises.
    """
    normal = dictionary @ dictionary.T
    inverse = 1.0 / torch.where(normal.diagonal() > 0, normal.diagonal(), 1.0)
    pull = (target @ dictionary.T) * mask
    enough = CONVERGED**2 * (pull.square() * inverse).sum(1, keepdim=True)
    solved = start.clone()
    residual = pull - (solved @ normal) * mask
    direction = residual * inverse
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(MOST_STEPS):
        active = slope > enough
        if not active.any():
            break
        ahead = (direction @ normal) * mask
        curve = (direction * ahead).sum(1, keepdim=True)
        step = torch.where(active & (curve > 0), slope / curve, 0.0)
        solved += step * direction
        residual -= step * ahead
        scaled = residual * inverse
        before, slope = slope, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(active, slope / before, 0.0) * direction
    return solved


def alternate(
    target: Tensor, dictionary: Tensor, coefficients: Tensor, mask: Tensor, ridge: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Least squares on either side in turns, the support fixed: dictionary and coefficients of no larger error.

    A round solves the coefficients, then the dictionary. The ridge can cost more than a round gains: such a round is
    dropped, and is the last.
    """
    error = squared_error(target, dictionary, coefficients)
    for _ in range(rounds):
        new_coefficients = solve_coefficients(target, dictionary, mask, coefficients)
        new_dictionary = solve_dictionary(target, new_coefficients, ridge)
        new_error = squared_error(target, new_dictionary, new_coefficients)
        if not new_error < error:
            break
        dictionary, coefficients, error = new_dictionary, new_coefficients, new_error
    return dictionary, coefficients
