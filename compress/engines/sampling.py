"""Sampling: which token comes next, given the logits. Temperature, top-k, top-p (nucleus), min-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Choose = Callable[[np.ndarray, Sequence[int]], int]
"""Logits float32 [vocabulary] and the ids so far -> the next id."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature: 0 takes the likeliest, the lowest id where several are; top_k: of so many, 0: all;
    top_p: of the fewest that together have this probability (Holtzman et al. 2020); min_p: of those with this share of the
    likeliest's (Nguyen et al. 2024); repeat_penalty: what positive logits of ids so far are divided by and negative ones
    multiplied (Keskar et al. 2019); seed: None draws anew every time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def first(cls, *choices: Mapping[str, float | None]) -> Sampling:
        """Every field as the first of some choices says that names it."""
        found = {key: value for choice in reversed(choices) for key, value in choice.items() if value is not None}
        return cls(**{key: int(value) if key in ("top_k", "seed") else float(value) for key, value in found.items()})  # type: ignore[arg-type]


def probabilities(logits: np.ndarray, so_far: Sequence[int], sampling: Sampling) -> np.ndarray:
    """Of every id, float64 [vocabulary], for a temperature above 0. Filters in transformers' order: penalty, temperature,
    top-k, top-p, min-p; the likeliest always stays."""
    scores = _penalized(logits, so_far, sampling.repeat_penalty) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = np.where(scores < np.partition(scores, -sampling.top_k)[-sampling.top_k], -np.inf, scores)
    found = _softmax(scores)
    if sampling.top_p < 1:
        order = np.argsort(-found, kind="stable")
        before = np.cumsum(found[order]) - found[order]  # what likelier ones have together
        found[order[(before >= sampling.top_p) & (before > 0)]] = 0.0
        found /= found.sum()
    if sampling.min_p > 0:
        found[found < sampling.min_p * found.max()] = 0.0
        found /= found.sum()
    return found


def chooser(sampling: Sampling) -> Choose:
    """Draws as `sampling` says; one seed gives one sequence of draws."""
    generator = np.random.default_rng(sampling.seed)

    def choose(logits: np.ndarray, so_far: Sequence[int]) -> int:
        if sampling.temperature <= 0:
            return int(_penalized(logits, so_far, sampling.repeat_penalty).argmax())
        return int(generator.choice(len(logits), p=probabilities(logits, so_far, sampling)))

    return choose


def likeliest(logits: np.ndarray, so_far: Sequence[int]) -> int:
    """Greedy: the id of the largest logit, the lowest where several are."""
    return int(logits.argmax())


def until(tokens: Iterable[int], stop: Callable[[Sequence[int]], bool]) -> list[int]:
    """Ids up to the one with which stop(ids so far) is true, that one included."""
    produced: list[int] = []
    for token in tokens:
        produced.append(token)
        if stop(produced):
            break
    return produced


def _penalized(logits: np.ndarray, so_far: Sequence[int], penalty: float) -> np.ndarray:
    scores = np.asarray(logits, np.float64)
    if penalty == 1.0 or not len(so_far):
        return scores
    seen = np.unique(np.asarray(so_far, np.int64))
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def _softmax(scores: np.ndarray) -> np.ndarray:
    found = np.exp(scores - scores.max())
    return found / found.sum()
