"""Sampling, held against transformers' own filters and against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compress.engines.sampling import Sampling, chooser, probabilities

LOGITS = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
SO_FAR = [3, 7, 7, 450]


@pytest.mark.parametrize(
    ("sampling", "filters"),
    [
        (Sampling(0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(1.0, top_k=12), [TopKLogitsWarper(12)]),
        (Sampling(1.3, top_p=0.8), [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
        (Sampling(1.0, min_p=0.1), [MinPLogitsWarper(0.1)]),
        (Sampling(1.0, repeat_penalty=1.4), [RepetitionPenaltyLogitsProcessor(1.4)]),
        (Sampling(0.6, 40, 0.9, 0.05, 1.2),
         [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.6), TopKLogitsWarper(40), TopPLogitsWarper(0.9),
          MinPLogitsWarper(0.05)]),
    ],
)  # fmt: skip
def test_probabilities_are_those_of_transformers(sampling: Sampling, filters: list) -> None:
    scores = LogitsProcessorList(filters)(torch.tensor([SO_FAR]), torch.from_numpy(LOGITS)[None].double())
    expected = torch.softmax(scores, -1)[0].numpy()
    found = probabilities(LOGITS, SO_FAR, sampling)
    assert (found > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    choose = chooser(Sampling(1.0, seed=1))
    counts = np.bincount([choose(logits, []) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)  # five standard errors


def test_a_seed_gives_the_same_draws_and_no_temperature_the_likeliest() -> None:
    draws = [
        [choose(LOGITS, []) for _ in range(20)]
        for choose in (chooser(Sampling(1.0, seed=5)), chooser(Sampling(1.0, seed=5)))
    ]
    assert draws[0] == draws[1] and len(set(draws[0])) > 1
    tied = np.array([0.0, 2.0, 2.0], np.float32)
    assert chooser(Sampling())(tied, []) == 1
    assert chooser(Sampling(repeat_penalty=3.0))(tied, [1]) == 2
    assert {chooser(Sampling(5.0, top_k=1, seed=seed))(LOGITS, []) for seed in range(9)} == {int(LOGITS.argmax())}
