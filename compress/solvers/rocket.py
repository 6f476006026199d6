"""Eigenvectors as the dictionary, coefficients by importance, then both solved again (ROCKET, arXiv 2602.11008).

1. The leading right singular vectors of `W L` are the first dictionary, `W L D^T` its coefficients.
2. A coefficient's importance is `|c_ij| |d_j L^-1|^exponent`, d_j L^-1 being the atom in the basis of the weight. Every
   row keeps its most important ones, a few less than s; what that saves goes to the most important of all others.
3. The dictionary is solved by ridge least squares for those coefficients; orthogonality is given up.

In place of the authors' Adam steps, `rounds` of exact least squares on either side; none that raises the error is kept.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor

from compress.solvers.dictionary import alternate, check_sizes, principal_axes, strongest
from compress.solvers.options import RocketOptions
from compress.solvers.whitening import whiten
from compress.weights import Factors

NEEDS_GRAM = True


def factorize(weight: Tensor, gram: Tensor, k: int, s: int, options: RocketOptions) -> Factors:
    """weight: float32 [m, n]; gram: [n, n] second moment of the inputs, any scale; 1 <= s <= k <= n.

    The mask keeps m * s coefficients; rows may differ in how many. Raises ValueError when the sizes do not fit the
    matrix, NumericalError when no damping makes the gram definite.
    """
    check_sizes(weight, k, s)
    whitened = whiten(weight, gram, options.damping)
    dictionary = principal_axes(whitened.target, k)
    projections = whitened.target @ dictionary.T
    sizes = whitened.unwhitened(dictionary).norm(dim=1)
    mask = support(projections.abs() * sizes**options.exponent, s, options.reactivated)
    dictionary, coefficients = alternate(
        whitened.target, dictionary, projections * mask, mask, options.ridge, options.rounds
    )
    return whitened.factors(dictionary, coefficients, mask)


def support(importance: Tensor, s: int, reactivated: float) -> Tensor:
    """Mask of m * s entries of importance [m, k], which is not negative: the largest `s - ceil(s * reactivated)` of
    every row, then the largest others of the whole matrix."""
    own = s - ceil(s * reactivated)
    mask = strongest(importance, own)
    shared = len(importance) * (s - own)
    others = importance.masked_fill(mask, -1.0).reshape(-1).topk(shared).indices
    return mask.reshape(-1).index_fill(0, others, True).reshape(mask.shape)
