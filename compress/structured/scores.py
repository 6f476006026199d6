"""What layers, experts, heads and channels are worth: pure functions on tensors.

High scores stay. Everything is computed from activations of the original model, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs.base import TINY

Expert = tuple[Tensor, Tensor, Tensor]
"""gate [n, h], up [n, h], down [h, n]."""


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after) of the residual stream around a block, one value a token (ShortGPT, arXiv 2403.03853).

    before, after: [..., h] -> [...], between 0 and 2; 1 where either is zero.
    """
    dot, norms = (before * after).sum(-1), before.norm(dim=-1) * after.norm(dim=-1)
    return 1.0 - dot / norms.clamp_min(TINY)


def reap_terms(act: Tensor, down: Tensor, gate: Tensor) -> Tensor:
    """Routing weight times the norm of the expert's output, one value a token that was routed to it.

    Their mean is REAP's saliency (arXiv 2510.13999). act: [tokens, n], input of down [h, n]; gate: [tokens].
    """
    return gate * (act @ down.T).norm(dim=-1)


@dataclass
class Fluctuation:
    """Mean and variance of every channel of an input of width n, over tokens that weigh the square of their gate.

    mean: float64 [n]; squares: float64 [n], weighted sum of (x - mean)^2; weight: sum of the weights; tokens: count.
    """

    mean: Tensor
    squares: Tensor
    weight: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device | None = None) -> Fluctuation:
        mean, squares = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
        return cls(mean, squares)

    def add(self, x: Tensor, gate: Tensor | None = None) -> None:
        """x: float32 [tokens, n]; gate: routing weights [tokens], by whose square an expert's squared error counts."""
        weights = x.new_ones(len(x)) if gate is None else gate.square()
        added = float(weights.double().sum())
        self.tokens += len(x)
        if not added:
            return
        mean = (weights @ x) / added
        share = added / (self.weight + added)  # two parts are joined as in Chan, Golub and LeVeque (1979)
        gap = mean.double() - self.mean
        self.squares += (weights @ (x - mean).square_()).double() + gap.square() * (self.weight * share)
        self.mean += gap * share
        self.weight += added

    def metric(self, weight: Tensor) -> Tensor:
        """var(x_j) |W_:j|^2, the mean squared error of replacing channel j by its mean (FLAP, arXiv 2312.11983).

        weight: [m, n], what reads the input -> float64 [n]; zeros before the second token.
        """
        if self.tokens < 2 or not self.weight:
            return torch.zeros_like(self.mean)
        variance = self.squares / self.weight * (self.tokens / (self.tokens - 1))
        return variance * weight.double().square().sum(0)


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending; of equal ones the first."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def cosines(products: Tensor) -> Tensor:
    """Cosine similarities [n, n] from a matrix of inner products; 0 where a vector is zero."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    return products / torch.outer(norms, norms).clamp_min(TINY)


def adopters(similarity: Tensor, kept: Sequence[int]) -> dict[int, list[int]]:
    """For every kept expert those that go and are most like it. similarity: [experts, experts]."""
    adopted: dict[int, list[int]] = {e: [] for e in kept}
    for e in range(len(similarity)):
        if e not in adopted:
            adopted[kept[int(similarity[e, list(kept)].argmax())]].append(e)
    return adopted


def merged(experts: Sequence[Expert], weights: Tensor) -> Expert:
    """Weighted mean of experts, their neurons first brought into the order of the first one's.

    An expert computes the same whatever the order of its neurons; the order that brings all three matrices nearest to
    the first expert's is an assignment problem (as in MC-SMoE, arXiv 2310.01334). weights: [experts], not
    negative; all zero: the first expert alone. float32 as given.
    """
    if not weights.sum():
        return experts[0]
    shares = (weights / weights.sum()).tolist()
    total = [shares[0] * part for part in experts[0]]
    for expert, share in zip(experts[1:], shares[1:], strict=True):
        order = _matching(expert, experts[0])
        gate, up, down = expert
        for sum_, part in zip(total, (gate[order], up[order], down[:, order]), strict=True):
            sum_ += share * part
    return total[0], total[1], total[2]


def _matching(expert: Expert, reference: Expert) -> Tensor:
    """Neurons of `expert` in the order of those of `reference` that they are nearest to."""
    from scipy.optimize import linear_sum_assignment

    pairs = list(zip(_neurons(reference), _neurons(expert), strict=True))
    products = pairs[0][0] @ pairs[0][1].T
    for a, b in pairs[1:]:
        products = products + a @ b.T
    return torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])


def _neurons(expert: Expert) -> Expert:
    gate, up, down = expert
    return gate, up, down.T
