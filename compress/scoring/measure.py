"""Everything a suite measures of one model, beside its original: perplexity, divergence, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from compress.scoring.divergence import Progress, Reference, Scores, frequency_perplexity, score_many
from compress.scoring.original import Answers, Original
from compress.scoring.results import Fallback, TaskScore
from compress.scoring.source import LogitSource
from compress.scoring.tasks import Outcomes, load_tasks, task_outcomes, task_scores
from compress.text import EvalWindows, Suite, Tokenizer, eval_windows

CHANCE = 2.0  # so many times worse than token frequencies, and a model does not know the language of the text
_TEXT_SHARE = 0.6  # of the progress bar; the rest goes to the tasks


@dataclass(frozen=True)
class Measured:
    """Scores of a model and, where there is one, of its original on the same windows and documents: on the suite's first
    text, and on all of them by name."""

    scores: Scores
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    base_scores: Scores | None = None
    base_tasks: dict[str, TaskScore] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()
    by_frequency: dict[str, float] = field(default_factory=dict)
    """Perplexity of every text's windows for one who only knows how often each token stands in them."""
    texts: dict[str, Scores] = field(default_factory=dict)
    base_texts: dict[str, Scores] = field(default_factory=dict)

    @property
    def doubts(self) -> list[str]:
        """What speaks against the original."""
        return [
            f"the original itself cannot predict this text ({name}): perplexity {scores.perplexity.value:.4g}, where the "
            f"mere frequency of its tokens gives {self.by_frequency[name]:.4g}; are its weights, config.json and tokenizer "
            "right?"
            for name, scores in self.base_texts.items()
            if not scores.perplexity.value <= CHANCE * self.by_frequency[name]
        ]


def measure(
    source: LogitSource,
    original: Original | None,
    suite: Suite,
    tokenizer: Tokenizer,
    *,
    label: str,
    max_positions: int,
    progress: Callable[[float], None] = lambda done: None,
) -> Measured:
    """Score `source` on a suite; without an original there is perplexity and task accuracy, but no comparison.

    tokenizer: the original's; label: what scorecards call it. max_positions: the model's limit in tokens. What
    tasks are left out (without lm-eval, all), `fallbacks` says. Raises CalibrationError for windows over the limit,
    RecipeError for a task that nobody knows, and what `score_many` and `task_outcomes` raise.
    """
    asked, lost = load_tasks(suite.tasks)  # before minutes are spent on text: a name that nobody knows is said at once
    texts = {
        name: eval_windows(
            text.text, tokenizer, windows=text.windows, protocol=text.protocol, max_positions=max_positions
        )
        for name, text in suite.texts.items()
    }
    measured = _on_texts(source, original, texts, label, _part(progress, 0.0, _TEXT_SHARE if asked else 1.0))
    share = (1 - _TEXT_SHARE) / (1 if original is None else 2)

    def ask(engine: LogitSource, start: float) -> Answers:
        moved = partial(_moved, progress, start, share)
        return task_outcomes(engine, tokenizer, asked, max_length=max_positions, progress=moved)

    before: dict[str, Outcomes] = {}
    if original is not None and asked:
        question = " ".join([str(max_positions), *(task.digest for task in asked)])
        before, lines = original.answers(question, partial(ask, original.source, _TEXT_SHARE))
        lost += lines
    after, lines = ask(source, 1 - share)
    lost += lines
    return replace(
        measured,
        tasks=task_scores(after, before),
        base_tasks=task_scores(before),
        fallbacks=tuple(dict.fromkeys(lost)),  # what holds for both engines is said once
    )


def _on_texts(
    source: LogitSource, original: Reference | None, texts: Mapping[str, EvalWindows], label: str, progress: Progress
) -> Measured:
    """Scores on every text; progress counts their tokens."""
    total, done = sum(windows.tokens.size for windows in texts.values()), 0
    scores: dict[str, Scores] = {}
    for name, windows in texts.items():
        part = _within(progress, done, windows.tokens.shape[1], total)
        scores[name], _ = score_many(original, [source], windows, tokenizer=label, progress=part)[0]
        done += windows.tokens.size
    first = next(iter(texts))
    base = {} if original is None else {name: found.of_reference(original.name) for name, found in scores.items()}
    return Measured(
        scores[first],
        base_scores=base.get(first),
        by_frequency={name: frequency_perplexity(windows) for name, windows in texts.items()},
        texts=scores,
        base_texts=base,
    )


def _within(progress: Progress, before: int, length: int, total: int) -> Progress:
    """Progress of windows of `length` tokens, after `before` tokens of `total`."""
    return lambda done, _: progress(before + done * length, total)


def _part(progress: Callable[[float], None], start: float, share: float) -> Progress:
    """Progress within a part of the whole, which begins at `start` and is `share` of it."""
    return lambda done, total: _moved(progress, start, share, done / total)


def _moved(progress: Callable[[float], None], start: float, share: float, done: float) -> None:
    progress(start + share * done)
