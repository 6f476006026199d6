"""Truncated singular value decomposition of the whitened weight (SVD-LLM, arXiv 2403.07378).

Of all products of rank k it has the least `tr((W-Q) G (W-Q)^T)` under the damped gram G: the sum of the squared
singular values that are cut (Eckart and Young). The control for dictionaries with sparse coefficients.
"""

from __future__ import annotations

from torch import Tensor

from compress.solvers.dictionary import check_sizes, principal_axes
from compress.solvers.options import SvdOptions
from compress.solvers.whitening import whiten
from compress.weights import Factors

NEEDS_GRAM = True


def factorize(weight: Tensor, gram: Tensor, k: int, s: int, options: SvdOptions) -> Factors:
    """weight: float32 [m, n]; gram: [n, n] second moment of the inputs, any scale; 1 <= k <= n; s is not used.

    Both factors carry the root of the singular values, roughly: `whitening.balanced` says how. Raises ValueError
    when k does not fit the matrix, NumericalError when no damping makes the gram definite.
    """
    check_sizes(weight, k, k)
    whitened = whiten(weight, gram, options.damping)
    dictionary = principal_axes(whitened.target, k)
    return whitened.factors(dictionary, whitened.target @ dictionary.T, None)
