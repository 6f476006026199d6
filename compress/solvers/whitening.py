"""The inputs' metric as a change of basis, in which the error of a layer's output is a plain Frobenius norm.

With the damped gram `G = L L^T`, `tr((W-Q) G (W-Q)^T) = |W L - Q L|^2`: factorise `W L`, then undo L on the dictionary
(truncation-aware data whitening of SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.solvers.base import damped_gram
from compress.weights import Factors


@dataclass(frozen=True)
class Whitened:
    """target: float64 [m, n], the weight in the basis of white inputs; root: float64 [n, n], lower triangular; damping,
    retries: what was added to the gram, as a fraction of its mean diagonal, and how often it had to be raised."""

    target: Tensor
    root: Tensor
    damping: float
    retries: int

    def unwhitened(self, dictionary: Tensor) -> Tensor:
        """Atoms [k, n] of the white basis in the basis of the weight: `dictionary root^-1`."""
        return torch.linalg.solve_triangular(self.root, dictionary, upper=False, left=False)

    def factors(self, dictionary: Tensor, coefficients: Tensor, mask: Tensor | None) -> Factors:
        """The factors that are stored, float32, of a dictionary [k, n] of the white basis and coefficients [m, k]."""
        dictionary, coefficients = balanced(self.unwhitened(dictionary), coefficients, mask)
        dictionary, coefficients = dictionary.float().contiguous(), coefficients.float().contiguous()
        return Factors(dictionary, coefficients, mask, self.damping, self.retries)


def whiten(weight: Tensor, gram: Tensor, damping: float) -> Whitened:
    """weight: [m, n]; gram: [n, n], of any scale; damping: a fraction of its mean diagonal.

    Raises NumericalError when no damping makes the gram definite.
    """
    damped, damping, retries = damped_gram(gram, damping)
    root = torch.linalg.cholesky(damped / damped.diagonal().mean())
    return Whitened(weight.double() @ root, root, damping, retries)


def balanced(dictionary: Tensor, coefficients: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same product with atoms of such sizes that the root mean square of every atom [n] is that of its coefficients
    which are stored; an atom that nothing uses becomes zero.

    Floats do not mind, if none leaves their range. Integer codes share a scale among neighbours in a row: columns of
    one atom, whatever its size, but coefficients of one output to different atoms. Rounding those to 4 bits costs
    linears of the demo model a quarter to a half of what it costs with atoms that are orthonormal in the white basis,
    and mostly less, by up to a fifth, than with atoms of one length or with coefficients of one size.
    """
    stored = len(coefficients) if mask is None else mask.sum(0).clamp_min(1)
    theirs = (coefficients.square().sum(0) / stored).sqrt()
    own = dictionary.square().mean(1).sqrt()
    ratio = (theirs / torch.where(own > 0, own, 1.0)).sqrt()
    return dictionary * ratio[:, None], coefficients / torch.where(ratio > 0, ratio, 1.0)
