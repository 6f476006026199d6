"""The original's next-token distributions, kept small: the most probable tokens of every position, and a sample of the rest.

KL(p || q) = sum of p log(p / q) + q - p over all tokens, whose terms are never negative. Over the k kept tokens the sum is
exact; over the rest it is p(rest) times the mean of r - 1 - log r with r = q / p over tokens drawn from p among them:
without bias, and as r is near 1 with little spread (estimator k3 of Schulman, "Approximating KL divergence", 2020).
Natural logarithms; a position is a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.scoring.divergence import TokenStats, log_mass, row_slices

LEAST, DRAWN = 256, 64  # tokens that are kept of a position at least, and drawn from the others


@dataclass(frozen=True)
class Kept:
    """Distributions of T positions over V tokens.

    ids: integers [T, k], ascending; log_p: float32 [T, k]; drawn: integers [T, DRAWN] from the other tokens by their
    probability, log_drawn float32 their own, rest: float64 [T], the mass of all others, 0 where there are none; first:
    integers [T], the most probable; nll: float64 [T], of the tokens that really followed.
    """

    ids: np.ndarray
    log_p: np.ndarray
    drawn: np.ndarray
    log_drawn: np.ndarray
    rest: np.ndarray
    first: np.ndarray
    nll: np.ndarray


def kept_tokens(positions: int, vocabulary: int, budget: int) -> int:
    """How many tokens of each of so many positions fit into `budget` bytes: all of them, or as many, at least LEAST."""
    each = _ids(vocabulary).itemsize + np.dtype(np.float32).itemsize
    return min(vocabulary, max(LEAST, budget // (each * max(positions, 1)) - DRAWN))


def keep(logits: np.ndarray, targets: np.ndarray, k: int, seed: int = 0) -> Kept:
    """What is kept of logits float32 [T, V], row t predicting targets[t]; 0 < k <= V; seed: of the draw."""
    rows, vocabulary = logits.shape
    start = np.random.default_rng(seed).random((rows,))
    kind = _ids(vocabulary)
    parts = []
    for part in row_slices(rows, vocabulary):
        log_all = logits[part] - log_mass(logits[part])[:, None]
        top = np.argpartition(logits[part], vocabulary - k, axis=1)[:, vocabulary - k :] if k < vocabulary else None
        top = np.sort(top, axis=1) if top is not None else np.broadcast_to(np.arange(vocabulary), log_all.shape)
        drawn, rest = _draw(log_all, top, start[part])
        log_p, log_drawn = (np.take_along_axis(log_all, ids, axis=1).astype(np.float32) for ids in (top, drawn))
        nll = -log_all[np.arange(len(top)), targets[part]]
        parts.append((top.astype(kind), log_p, drawn.astype(kind), log_drawn, rest, logits[part].argmax(axis=1), nll))
    return Kept(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _draw(log_all: np.ndarray, top: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DRAWN of the tokens outside `top` [T, k], by their probability, systematically from start [T] in [0, 1); their mass."""
    mass = np.exp(log_all)
    np.put_along_axis(mass, top, 0.0, axis=1)
    mass = mass.cumsum(axis=1)
    rest = mass[:, -1].copy()
    points = (np.arange(DRAWN) + start[:, None]) / DRAWN * rest[:, None]
    drawn = np.stack([np.searchsorted(row, at, side="right") for row, at in zip(mass, points, strict=True)])
    return drawn.clip(max=mass.shape[1] - 1), rest


def compare(kept: Kept, logits: np.ndarray, targets: np.ndarray) -> TokenStats:
    """The candidate's logits float32 [T, V] beside what was kept of the reference; see `token_stats`, whose KL this is
    where all tokens are kept."""
    rows, vocabulary = logits.shape
    nll, kld = np.empty(rows), np.empty(rows)
    for part in row_slices(rows, vocabulary):
        here = logits[part]
        mass = log_mass(here)
        kld[part] = _terms(kept.log_p[part], here, mass, kept.ids[part], weighted=True).sum(axis=1)
        if kept.ids.shape[1] < vocabulary:
            kld[part] += kept.rest[part] * _terms(kept.log_drawn[part], here, mass, kept.drawn[part]).mean(axis=1)
        nll[part] = mass - here[np.arange(len(here)), targets[part]]
    return TokenStats(kept.nll, nll, kld, logits.argmax(axis=1) == kept.first)


def _terms(
    log_p: np.ndarray, logits: np.ndarray, mass: np.ndarray, ids: np.ndarray, *, weighted: bool = False
) -> np.ndarray:
    """r - 1 - log r of some tokens, times p where weighted; float64. mass: of `_log_mass`."""
    log_q = np.take_along_axis(logits, ids.astype(np.int64), axis=1) - mass[:, None]
    log_q = log_q.astype(np.float32)  # as log_p is
    log_p = log_p.astype(np.float64)
    log_r = log_q - log_p
    terms = np.expm1(log_r) - log_r
    return np.exp(log_p) * terms if weighted else terms


def _ids(vocabulary: int) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
