"""Mean squared errors on a Gaussian source that other tests compare with, derived from the normal distribution itself."""

from __future__ import annotations

from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import pytest
import torch

from compress.codecs import block_codec
from compress.codecs.names import codec_info
from compress.codecs.nf4 import LEVELS
from compress.solvers import rtn
from compress.solvers.options import RtnOptions

# Max, IRE Trans. Inf. Theory 6, 1960, table I; also what TurboQuant (arXiv 2504.19874, theorem 1) reaches in high dimension
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def _density(x: float) -> float:
    return exp(-x * x / 2) / sqrt(2 * pi)


def _moments(low: float, high: float) -> tuple[float, float, float]:
    """Integrals of 1, x and x^2 over the standard normal from low to high."""
    mass = (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2
    ends = [0.0 if abs(x) == inf else x * _density(x) for x in (low, high)]
    return mass, _density(low) - _density(high), mass + ends[0] - ends[1]


def _error(levels: list[float]) -> float:
    """Mean squared error of rounding a standard normal to the nearest of sorted levels, in closed form."""
    edges = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
    total = 0.0
    for level, ends in zip(levels, pairwise(edges), strict=True):
        mass, first, second = _moments(*ends)
        total += second - 2 * level * first + level * level * mass
    return total


def _lloyd_max(bits: int) -> float:
    """Levels moved to the mean of their cell until they stay."""
    count = 2**bits
    levels = [4 * (i + 0.5) / count - 2 for i in range(count)]
    for _ in range(2000):
        edges = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
        cells = [_moments(*ends) for ends in pairwise(edges)]
        levels = [first / mass for mass, first, _ in cells]
    return _error(levels)


@pytest.mark.parametrize(("bits", "published"), LLOYD_MAX.items())
def test_published_scalar_errors_are_the_closed_form(bits: int, published: float) -> None:
    assert _lloyd_max(bits) == pytest.approx(published, rel=1e-3)


def _measured(name: str, columns: int = 4096, rows: int = 16) -> float:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    decoded = rtn.solve(weight, None, block_codec(name, columns), RtnOptions()).decode()
    return float((weight - decoded).square().mean() / weight.square().mean())


@pytest.mark.parametrize(
    ("name", "limit"),
    # the search goes down from the largest weight and may stop above the best scale of so long a row
    [("int2-row", 1.03), ("int3-row", 1.16), ("int4-row", 1.03), ("int2-row-asym", 1.08), ("int4-row-asym", 1.03)],
)
def test_long_rows_of_integers_come_near_their_best_scale(name: str, limit: float) -> None:
    """One scale for thousands of columns, against the best evenly spaced levels with one of them at zero."""
    bits = codec_info(name).bits
    codes = range(2**bits)
    scales = [0.1 + 0.001 * i for i in range(1500)]
    zeros = [2 ** (bits - 1)] if codec_info(name).symmetric else codes
    best = min(_error([scale * (code - zero) for code in codes]) for scale in scales for zero in zeros)
    assert LLOYD_MAX[bits] < best
    assert 0.95 * best < _measured(name) < limit * best


def test_nf4_levels_at_their_best_scale_lose_to_lloyd_max() -> None:
    """What a row without blocks would reach; the code is made for the largest of 64, not for the least error."""
    best = min(_error([level * (1.5 + 0.005 * i) for level in LEVELS]) for i in range(400))
    assert LLOYD_MAX[4] < best < 1.35 * LLOYD_MAX[4]


@pytest.mark.parametrize("name", ["e8p", "e8p3", "e8p4", "trellis2", "trellis3", "trellis4"])
def test_vector_codecs_beat_every_scalar_and_not_shannon(name: str) -> None:
    bits = codec_info(name).bits
    assert 4.0**-bits < _measured(name, 512) < 0.87 * _lloyd_max(bits)
