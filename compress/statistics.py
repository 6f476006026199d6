"""Accumulators of what a linear's input looks like, in the compressed model and against the original.

Moments are sums over tokens in float32. With x the input in the compressed model and x0 the same input in the
original, `gram` is sum w x x^T and `drift` sum w (x0 - x) x^T. A weight W that should reproduce W x0 from x has the
least-squares target W + W drift (gram + damping)^-1 (GPTAQ, arXiv 2504.02692, eq. 6, in this notation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.products import add_product


@dataclass
class Moments:
    """Second moments of one group of inputs of width n.

    gram, drift: float32 [n, n] sums (drift None when only one model is run); residual: [m, n], sum of
    w (r0 - r) x^T for the residual stream r that the output is added to, or None; absolute, peak, squares: [n], sum and
    maximum of |x| and sum of x^2 over tokens whatever their weight, or None; weight: sum of w; tokens: count.
    """

    gram: Tensor
    drift: Tensor | None = None
    residual: Tensor | None = None
    absolute: Tensor | None = None
    peak: Tensor | None = None
    weight: float = 0.0
    tokens: int = 0
    squares: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        n: int,
        *,
        drift: bool = False,
        residual: int | None = None,
        magnitudes: bool = False,
        squares: bool = False,
        device: torch.device | None = None,
    ) -> Moments:
        """Nothing seen yet, of what is asked for; on the CPU unless a device is given."""

        def sums(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(
            sums(n, n),
            sums(n, n) if drift else None,
            sums(residual, n) if residual else None,
            sums(n) if magnitudes else None,
            sums(n) if magnitudes else None,
            squares=sums(n) if squares else None,
        )

    def add(
        self, x: Tensor, original: Tensor | None = None, gate: Tensor | None = None, lag: Tensor | None = None
    ) -> None:
        """x, original: float32 [tokens, n]; gate: routing weights [tokens], an expert's error being scaled by its gate
        and its squared error by the gate squared; lag: r0 - r [tokens, m]."""
        self.tokens += x.shape[0]
        self.weight += float(x.shape[0] if gate is None else (gate.double() ** 2).sum())
        scaled = x if gate is None else x * gate[:, None]
        add_product(self.gram, scaled, scaled)
        if self.drift is not None and original is not None:
            gap = original - x if gate is None else (original - x) * gate[:, None]
            add_product(self.drift, gap, scaled)
        if self.absolute is not None and self.peak is not None and len(x):
            self.absolute += x.abs().sum(0)
            torch.maximum(self.peak, x.abs().amax(0), out=self.peak)
        if self.squares is not None:
            self.squares += x.square().sum(0)
        if self.residual is not None and lag is not None:
            add_product(self.residual, lag if gate is None else lag * gate[:, None], scaled)

    @property
    def finite(self) -> bool:
        """Whether every activation so far was; one that is not spoils its gram for good."""
        sums = (self.gram.diagonal(), self.drift, self.residual, self.absolute)
        return all(bool(torch.isfinite(s).all()) for s in sums if s is not None)


@dataclass(frozen=True)
class Statistics:
    """What a solver receives: means per unit weight.

    gram [n, n]; drift [n, n] or None; residual [m, n] or None; tokens seen; borrowed: share of the gram that comes
    from the pool, 0 to 1; weight: the own weight that a sum over all tokens would have.
    """

    gram: Tensor
    drift: Tensor | None
    residual: Tensor | None
    tokens: int
    borrowed: float = 0.0
    weight: float = 1.0


def blend(own: Moments, pool: Moments | None, strength: float) -> Statistics:
    """An expert's statistics, shrunk towards its block's pool in proportion to how little the expert saw.

    gram = (t own + k pool) / (t + k) with t the tokens seen and k = strength * n: a second moment of width n needs a
    few n tokens before it can be trusted. Both are normalised by their own weight first. An expert without tokens
    gets the pool alone; drift and residual are shrunk by the same share, towards the pool's where it has them.
    """
    share = 0.0
    if pool is not None and pool.tokens:
        prior = strength * own.gram.shape[0]
        share = prior / (own.tokens + prior) if own.tokens + prior > 0 else 1.0

    def mixed(mine: Tensor, theirs: Tensor | None) -> Tensor:
        out = (1.0 - share) * mine / max(own.weight, 1e-30)
        if pool is None or theirs is None or not share:
            return out
        return out + share * theirs / max(pool.weight, 1e-30)

    return Statistics(
        mixed(own.gram, None if pool is None else pool.gram),
        None if own.drift is None else mixed(own.drift, None if pool is None else pool.drift),
        None if own.residual is None else mixed(own.residual, None if pool is None else pool.residual),
        own.tokens,
        share,
        own.weight,
    )


def corrected_target(
    weight: Tensor, statistics: Statistics, damping: float, strength: float, residual_strength: float = 0.0
) -> Tensor:
    """The float weight that best reproduces the original's output from the compressed model's inputs.

    weight: [m, n] -> [m, n]: W + (strength W drift + residual_strength residual) (gram + damping mean(diag) I)^-1.
    """
    pull = torch.zeros_like(weight)
    if statistics.drift is not None and strength:
        pull += strength * (weight @ statistics.drift)
    if statistics.residual is not None and residual_strength:
        pull += residual_strength * statistics.residual
    if not pull.any():
        return weight
    gram = statistics.gram.to(torch.float64, copy=True)
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp_min(1e-30))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise NumericalError(f"gram cannot be factorised with a ridge of {damping:g} of its mean; raise drift_damping")
    return weight + torch.cholesky_solve(pull.T.double(), factor).T.float()
