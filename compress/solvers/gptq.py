"""Error feedback (GPTQ) for scalar, lattice and trellis codecs, then coordinate descent on codes and scales.

Minimises tr((W-Q) H (W-Q)^T), H the damped gram of the layer's inputs.

1. Scales from the codec's own importance-weighted search.
2. Feedback (GPTQ, arXiv 2210.17323, algorithm 1; eight columns at a time it is LDLQ, arXiv 2307.13304): with
   U^T U = H^-1, round a step b of columns to the point nearest under (U_bb^T U_bb)^-1 and move the rounding error
   (x - q) U_bb^-1 U_b,rest to the columns not yet rounded.
3. Sweeps: every step of columns moves to the code nearest its optimum given all others, then every stored scale
   does. Each move lowers the objective; feedback alone never looks back.
"""

from __future__ import annotations

from torch import Tensor

from compress.codecs.base import BlockCodec
from compress.solvers.base import Solution
from compress.solvers.options import GptqOptions
from compress.solvers.quantize import quantize, quantize_alike

NEEDS_GRAM = True


def solve(
    weight: Tensor, gram: Tensor, codec: BlockCodec, options: GptqOptions, mask: Tensor | None = None
) -> Solution:
    """weight: float32 [R, n]; gram: [n, n] second moment of the inputs, any scale. n must be a multiple of the span.

    mask: bool [R, n]. Where it is False the result is zero, whatever the weight is there: the kept weights first take
    over from the others as floats, and it is these that are rounded. Raises NumericalError when the gram cannot be
    factorised, ValueError for a mask with a codec that cannot store single zeros.
    """
    return quantize(weight, gram, codec, options, mask)


def solve_alike(weights: Tensor, grams: Tensor, codec: BlockCodec, options: GptqOptions) -> list[Solution]:
    """Several matrices of one shape at once, each as `solve` alone would. weights: float32 [B, R, n]; grams: [B, n, n]; the codec is
    one that stacks (`BlockCodec.stacks`)."""
    return quantize_alike(weights, grams, codec, options)
