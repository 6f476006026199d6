"""Orthonormal fast Hadamard transforms of any length, and their inverses.

A Hadamard matrix has entries +-1 and orthogonal rows. Those of the orders here come from three constructions: Sylvester
(powers of two), Paley (order q + 1 or 2 (q + 1) for a prime q; J. Math. Phys. 12, 1933) and, where no such prime
exists, Goethals and Seidel's array of four circulants (J. Austral. Math. Soc. 11, 1970), whose first rows are a table.
A transform of length n is the Kronecker product of a few small matrices and costs n times the sum of their orders.
"""

from __future__ import annotations

import hashlib
from functools import cache
from math import isqrt, prod

import torch
from torch import Tensor

LARGEST_BASE = 252
RADIX = 6  # log2 of the largest Sylvester factor: few passes over memory, each a matmul

# First rows of the circulants A, B, C, D; bit i is set where entry i is -1. See NOTICE for their source.
_CIRCULANTS = {
    52: (0x161A, 0x1C0E, 0xB34, 0x1EDE),
    92: (0x117E88, 0x1CA538, 0x498192, 0x3BA5DC),
    100: (0x10F33C2, 0x474B88, 0x1227912, 0x195FEA6),
    116: (0xDA2116C, 0x25C0E90, 0x17340B3A, 0x735EB38),
    156: (0x1AFB3CDF58, 0xECF5AF370, 0x1975BDAE98, 0x72BE247D4E),
    172: (0x730A26450CE, 0x207AC935E04, 0x14D42F42B28, 0x385B3FCDA1C),
    188: (0x3B03D70E7B7A, 0x3B03D7718485, 0x368FBB9A456E, 0x368FBBE5BA91),
    236: (0x610DCBA17433420, 0x4BA761097433421, 0x610DCBA28BCCBDF, 0x34589EF57433421),
    244: (0xD9A86FBF7D8566C, 0xD9A86FBF7D8566C, 0x1D439A5C0E9670AE, 0x2BC65A3F1698F50),
}


def hadamard_transform(x: Tensor, dim: int = -1) -> Tensor:
    """`H x` along `dim` with H orthonormal: Sylvester's matrix for powers of two, else a Kronecker product with bases.

    x: floating point [..., n, ...]; same shape and dtype back, computed in float32 (float64 for float64). Lengths for
    which no matrix is known here (n = 6, or 107 * 128) are transformed in blocks of `block_length(n)`.
    Differentiable. Raises ValueError for an empty dimension.
    """
    return _apply(x, dim, inverse=False)


def inverse_hadamard_transform(x: Tensor, dim: int = -1) -> Tensor:
    """`H^T x` along `dim`: undoes `hadamard_transform`, whose bases need not be symmetric."""
    return _apply(x, dim, inverse=True)


def random_signs(n: int, key: str) -> Tensor:
    """The +-1 of a randomised transform, float32 [n]: bits of SHAKE-256, eight to a byte from the lowest, set for -1.

    Unlike a random generator's they are the same for ever, on every machine, and nothing keeps a state. They are drawn on
    the CPU and stay there: callers move them.
    """
    stream = torch.tensor(list(hashlib.shake_256(f"compress {key}".encode()).digest(-(-n // 8))), dtype=torch.uint8)
    bits = stream[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return 1.0 - 2.0 * bits.flatten()[:n].float()


def block_length(n: int) -> int:
    """Columns that the transform of length n mixes: n itself, or its largest divisor with a known matrix."""
    return prod(_factors(n))


def hadamard_base(order: int) -> Tensor:
    """Hadamard matrix of `order` in {1, 2, 4} or an odd multiple of 4 up to 252, float64 [order, order] of +-1.

    Raises ValueError for other orders.
    """
    if order in (1, 2, 4):
        return _sylvester(order)
    if order % 8 != 4 or not 4 < order <= LARGEST_BASE:
        raise ValueError(f"no Hadamard base of order {order}; bases are odd multiples of 4 up to {LARGEST_BASE}")
    if order in _CIRCULANTS:
        return _goethals_seidel(order)
    return _paley_one(order - 1) if _is_prime(order - 1) else _paley_two(order // 2 - 1)


def _apply(x: Tensor, dim: int, *, inverse: bool) -> Tensor:
    moved = x.movedim(dim, -1)
    shape = moved.shape
    factors = _factors(shape[-1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = moved.to(wide).reshape(-1, prod(factors))
    # each factor acts on the last axis, which then moves to the front: after all of them the order is the old one
    for order in reversed(factors):
        matrix = _factor(order, wide, x.device)
        y = (y.reshape(-1, y.shape[1] // order, order) @ (matrix if inverse else matrix.T)).transpose(1, 2).flatten(1)
    return y.reshape(shape).to(x.dtype).movedim(-1, dim)


@cache
def _factors(n: int) -> tuple[int, ...]:
    """Orders whose Kronecker product is the transform of length n (of one block of it)."""
    if n < 1:
        raise ValueError(f"cannot transform {n} columns")
    divisors = {d for i in range(1, isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    for block in sorted(divisors, reverse=True):
        twos = (block & -block).bit_length() - 1
        bases = _bases(block >> twos, twos)
        if bases is not None:
            rest = twos - 2 * len(bases)
            passes = -(-rest // RADIX)
            return (*bases, *(2 ** (rest // passes + (i < rest % passes)) for i in range(passes)))
    raise AssertionError("one divides every length")


def _bases(odd: int, twos: int) -> tuple[int, ...] | None:
    """Cheapest bases 4 a, 4 b, ... with a b ... = odd, each of which takes two of the `twos` factors of two."""
    if odd == 1:
        return ()
    found = []
    for a in range(3, min(odd, LARGEST_BASE // 4) + 1, 2):
        if odd % a == 0 and twos >= 2:
            rest = _bases(odd // a, twos - 2)
            if rest is not None:
                found.append((4 * a, *rest))
    return min(found, key=sum, default=None)


@cache
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal factor; made outside inference mode, because a cached tensor may later meet autograd."""
    with torch.inference_mode(False):
        matrix = _sylvester(order) if order & (order - 1) == 0 else hadamard_base(order)
        return (matrix / order**0.5).to(device, dtype)


def _sylvester(order: int) -> Tensor:
    """Order 2^k; entry (i, j) is minus one to the number of bits that i and j share."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(two, matrix)
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, isqrt(n) + 1))


def _conference(q: int) -> Tensor:
    """Zero diagonal, C C^T = q I: Jacobsthal's matrix of quadratic residues with a border; q an odd prime."""
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    c = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    c[1:, 1:] = character[(i[:, None] - i) % q]
    c[0, 1:] = 1.0
    c[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return c


def _paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime q = 3 mod 4: I + C with C skew."""
    return _conference(q) + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1) for a prime q = 1 mod 4, from the symmetric C."""
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_conference(q), on) + torch.kron(torch.eye(q + 1, dtype=torch.float64), off)


def _goethals_seidel(order: int) -> Tensor:
    """Four circulants with A A^T + B B^T + C C^T + D D^T = order I; R reverses the columns."""
    k = order // 4
    i = torch.arange(k)
    shift = (i - i[:, None]) % k
    a, b, c, d = (
        torch.tensor([-1.0 if row >> j & 1 else 1.0 for j in range(k)], dtype=torch.float64)[shift]
        for row in _CIRCULANTS[order]
    )
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    btr, ctr, dtr = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    rows = ((a, br, cr, dr), (-br, a, dtr, -ctr), (-cr, -dtr, a, btr), (-dr, ctr, -btr, a))
    return torch.cat([torch.cat(row, 1) for row in rows])
