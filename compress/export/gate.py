"""The figures of an artifact, and the limits that it must keep to be delivered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.export.text import plan_tokenizer
from compress.plan.plan import Plan
from compress.report.scorecard import Artifact, Check
from compress.scoring.measure import Measured, measure
from compress.scoring.original import Original
from compress.scoring.source import LogitSource
from compress.text import load_suite


def measured(plan: Plan, source: LogitSource, original: Original, progress: Callable[[float], None]) -> Measured:
    """What the recipe's suite measures of an artifact beside the original."""
    assert plan.recipe.score is not None
    return measure(
        source,
        original,
        load_suite(plan.recipe.score.suite),
        plan_tokenizer(plan),
        label=plan.identity.name,
        max_positions=plan.spec.max_positions,
        progress=progress,
    )


def limits(plan: Plan, artifact: Artifact) -> list[Check]:
    """The recipe's own limits, and that the scores are finite at all."""
    scores, gate, checks = artifact.scores, plan.recipe.gate, []
    assert scores is not None and scores.kld is not None and scores.perplexity_ratio is not None
    ratio = scores.perplexity_ratio.value
    checks.append(
        Check(
            name=f"{artifact.container} perplexity",
            passed=bool(np.isfinite(ratio)),
            detail=f"{scores.perplexity.value:.2f}, original {scores.perplexity.value / ratio:.2f}",
        )
    )
    for name, value, limit in (
        ("KL divergence", scores.kld.mean, gate.max_kld),
        ("perplexity ratio", ratio, gate.max_perplexity_ratio),
    ):
        if limit is not None:
            checks.append(
                Check(
                    name=f"{artifact.container} {name}",
                    passed=bool(value <= limit),
                    detail=f"{value:.4g}, limit {limit:g}",
                )
            )
    return checks
