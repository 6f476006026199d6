"""What a model answered to each document of a task, and the rows of a scorecard that come of it.

Intervals, 95%: a share of right answers has Wilson's score interval over documents; other means, and the logarithm of a word
perplexity, Student's t; differences between two models are paired by document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.scoring.flips import flips, paired_change, share
from compress.scoring.intervals import Interval, exponential, mean_interval, paired_difference
from compress.scoring.results import TaskScore

PERPLEXITY = "perplexity"  # lm-eval's name of the metric whose values are log-likelihoods


@dataclass(frozen=True)
class Outcomes:
    """Per-document results of one task.

    documents  the documents' places in their files, int64 [n]; two are compared only where these are equal
    values     by metric, float64 [n] each, the headline first; for "perplexity" log-likelihoods of the target in nats
    groups     a name for each document;  answers: what was answered, the choice's number or the text
    title      what a table calls the task
    """

    documents: np.ndarray
    values: Mapping[str, np.ndarray]
    groups: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    title: str = ""

    @property
    def headline(self) -> str:
        return next(iter(self.values))

    def of(self, member: np.ndarray) -> Outcomes:
        """Those of some documents, bool [n], by the headline alone."""
        answers = None if self.answers is None else tuple(a for a, m in zip(self.answers, member, strict=True) if m)
        return Outcomes(self.documents[member], {self.headline: self.values[self.headline][member]}, None, answers)

    def saved(self) -> dict[str, Any]:
        """As JSON holds it; `restored` makes it whole again, to the bit."""
        values = {name: value.tolist() for name, value in self.values.items()}
        return {**vars(self), "documents": self.documents.tolist(), "values": values}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Outcomes:
        lists = {key: None if saved[key] is None else tuple(saved[key]) for key in ("groups", "answers")}
        values = {name: np.array(value, np.float64) for name, value in saved["values"].items()}
        return cls(np.array(saved["documents"], np.int64), values, **lists, title=saved["title"])


def task_scores(
    outcomes: Mapping[str, Outcomes], originals: Mapping[str, Outcomes] | None = None
) -> dict[str, TaskScore]:
    """Rows by name: "<task>" (its headline metric), "<task>.<further metric>", "<task>.<group>"; see `TaskScore`.

    originals: outcomes of the original; tasks of it that are not there are not compared. ValueError where the documents
    of a task differ.
    """
    originals = originals or {}
    return {
        label: row for name, found in outcomes.items() for label, row in _task_rows(name, found, originals.get(name))
    }


def _task_rows(name: str, found: Outcomes, original: Outcomes | None) -> Iterator[tuple[str, TaskScore]]:
    if original is not None and not np.array_equal(found.documents, original.documents):
        raise ValueError(f"{name}: task results to compare must come from the same documents")
    for metric in found.values:
        label = name if metric == found.headline else f"{name}.{metric}"
        yield label, _row(metric, found, original)
    for group in sorted(set(found.groups or ())):
        member = np.array([entry == group for entry in found.groups or ()])
        part = None if original is None else original.of(member)
        yield f"{name}.{group}", _row(found.headline, found.of(member), part).model_copy(update={"group": group})


def _row(metric: str, found: Outcomes, original: Outcomes | None) -> TaskScore:
    values, count = found.values[metric], len(found.documents)
    before = None if original is None else original.values.get(metric)
    facts: dict[str, Any] = {"n": count, "title": found.title}
    if metric == PERPLEXITY:
        return TaskScore(
            metric="word perplexity", kind="perplexity", **vars(exponential(mean_interval(-values))), **facts
        )
    if not all(_binary(column) for column in (values, before) if column is not None):
        change = None if before is None else _change("difference of means", paired_difference(values, before), count)
        return TaskScore(metric=metric, kind="mean", difference=change, **vars(mean_interval(values)), **facts)
    right = values == 1
    if original is not None and before is not None:
        answers = None
        if metric == found.headline and found.answers is not None and original.answers is not None:
            answers = original.answers, found.answers
        facts["flips"] = flips(before == 1, right, answers)
        facts["difference"] = _change("accuracy difference", paired_change(before == 1, right), count)
    return TaskScore(metric=metric, kind="share", **vars(share(right)), **facts)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _change(metric: str, interval: Interval, count: int) -> dict[str, Any]:
    return {"metric": metric, **vars(interval), "n": count}
