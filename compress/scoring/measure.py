"""Everything a suite measures of one model, beside its original: perplexity, divergence, tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from compress.scoring.divergence import Progress, Scores, frequency_perplexity, score_many
from compress.scoring.results import Fallback, TaskScore
from compress.scoring.source import LogitSource
from compress.text import Suite, Tokenizer, eval_windows

CHANCE = 2.0  # so many times worse than token frequencies, and a model does not know the language of the text
_TEXT_SHARE = 0.6  # of the progress bar; the rest goes to the tasks


@dataclass(frozen=True)
class Measured:
    """Scores of a model and, where there is one, of its original on the same windows and documents."""

    scores: Scores
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    base_scores: Scores | None = None
    base_tasks: dict[str, TaskScore] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()
    by_frequency: float = 0.0
    """Perplexity of these windows for one who only knows how often each token stands in them."""

    @property
    def doubts(self) -> list[str]:
        """What speaks against the original."""
        if self.base_scores is None or self.base_scores.perplexity.value <= CHANCE * self.by_frequency:
            return []
        return [
            f"the original itself cannot predict this text: perplexity {self.base_scores.perplexity.value:.4g}, where the "
            f"mere frequency of its tokens gives {self.by_frequency:.4g}; are its weights, config.json and tokenizer right?"
        ]


def measure(
    source: LogitSource,
    original: LogitSource | None,
    suite: Suite,
    tokenizer: Tokenizer,
    *,
    label: str,
    max_positions: int,
    progress: Callable[[float], None] = lambda done: None,
) -> Measured:
    """Score `source` on a suite; without an original there is perplexity and task accuracy, but no comparison.

    tokenizer: the original's; label: what scorecards call it. max_positions: the model's limit in tokens. Without
    lm-eval the tasks are left out and `fallbacks` says so. Raises CalibrationError for windows over the limit, and
    what `score_many` raises.
    """
    windows = eval_windows(
        suite.text, tokenizer, windows=suite.windows, length=suite.length, max_positions=max_positions
    )
    scores, _ = score_many(original, [source], windows, tokenizer=label, progress=_part(progress, 0.0, _TEXT_SHARE))[0]
    base_scores = None if original is None else replace(scores.of_reference(), engine=original.name)
    measured = Measured(scores, base_scores=base_scores, by_frequency=frequency_perplexity(windows))
    if not suite.tasks:
        return measured
    if find_spec("lm_eval") is None:
        missing = Fallback(
            subject="tasks",
            wanted=", ".join(suite.tasks),
            used="not scored",
            reason="lm-eval is not installed: pip install 'compress-llm[eval]'",
        )
        return replace(measured, fallbacks=(missing,))

    from compress.scoring.tasks import Outcomes, compare, summarise, task_outcomes

    engines = [source] if original is None else [original, source]
    share = (1 - _TEXT_SHARE) / len(engines)
    outcomes: list[dict[str, Outcomes]] = []
    for engine in engines:
        part = _part(progress, _TEXT_SHARE + share * len(outcomes), share)
        outcomes.append(task_outcomes(engine, tokenizer, suite.tasks, max_length=max_positions, progress=part))
    after, before = outcomes[-1], outcomes[0] if original is not None else {}
    tasks = {
        name: TaskScore(**row, difference=compare(after[name], before[name]) if name in after and before else None)
        for name, row in summarise(after).items()
    }
    return replace(
        measured, tasks=tasks, base_tasks={name: TaskScore(**row) for name, row in summarise(before).items()}
    )


def _part(progress: Callable[[float], None], start: float, share: float) -> Progress:
    """Progress within a part of the whole, which begins at `start` and is `share` of it."""
    return lambda done, total: progress(start + share * done / total)
