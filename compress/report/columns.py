"""What a comparison shows of every row, column by column; terminal, Markdown and HTML lay these out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.reading import shown
from compress.report.compare import Comparison, Row, accuracies, accuracy_change
from compress.report.numbers import DASH, NOTHING, Cell, bits, estimate, human_bytes, interval, percent, significant
from compress.scoring.divergence import Scores
from compress.scoring.intervals import Interval
from compress.scoring.results import Speed, Spread, TaskScore, task_title


@dataclass(frozen=True)
class Column:
    """heading; what it shows of a row; a line that explains it. key: it stands in front where there is room for few."""

    heading: str
    cell: Callable[[Row], Cell]
    about: str = ""
    left: bool = False
    key: bool = False


def columns(comparison: Comparison) -> list[Column]:
    """Those in which any row has something to say."""
    found = [*_of_files(), *_of_text(), *_of_further_texts(comparison), *_of_tasks(comparison), *_of_speed()]
    return [column for column in found if any(column.cell(row).text != DASH for row in comparison.rows)]


def _of_files() -> list[Column]:
    return [
        Column("container", lambda row: Cell(shown(row.container) or DASH), left=True),
        Column("size", lambda row: Cell(human_bytes(row.bytes)), "all files that are needed to run it", key=True),
        Column(
            "share of original",
            lambda row: Cell(percent(row.share)),
            "bytes of all files that are needed to run it, over those of the original",
        ),
        Column(
            "bits per weight",
            lambda row: Cell(bits(row.bits_per_weight)),
            "bits of its weight files per weight of the original",
        ),
    ]


def _of_text() -> list[Column]:
    def scored(read: Callable[[Scores], Cell]) -> Callable[[Row], Cell]:
        return lambda row: NOTHING if row.scores is None else read(row.scores)

    def tail(scores: Scores) -> Cell:
        return NOTHING if scores.kld is None else Cell(significant(scores.kld.p999))

    return [
        Column(
            "KL",
            lambda row: interval(row.kld),
            "mean KL divergence from the original's predictions, nats per token; 0 is the same",
            key=True,
        ),
        Column("KL 99.9%", scored(tail), "999 of 1000 tokens are closer than this"),
        Column("perplexity", scored(lambda s: interval(s.perplexity)), "of tokens"),
        Column("word perplexity", scored(lambda s: interval(s.word_perplexity)), "perplexity per word"),
        Column(
            "perplexity ratio", scored(lambda s: interval(s.perplexity_ratio)), "perplexity over the original's, paired"
        ),
        Column(
            "top-1",
            scored(lambda s: interval(s.top1_agreement, 100, "%")),
            "tokens where both put the same one first",
        ),
    ]


def _of_further_texts(comparison: Comparison) -> list[Column]:
    def divergence(name: str) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            kld = row.texts[name].kld if name in row.texts else None
            return NOTHING if kld is None else estimate(kld.mean, kld.low, kld.high)

        return cell

    return [Column(f"KL, {shown(name)}", divergence(name), "the same on another text") for name in comparison.texts]


def _of_tasks(comparison: Comparison) -> list[Column]:
    names = accuracies(comparison)
    found = []
    if len(names) > 1:
        found.append(
            Column(
                "all tasks",
                lambda row: NOTHING if row.mark else interval(accuracy_change(row, names), 100),
                f"change of accuracy against the original, points: mean of {len(names)} tasks",
            )
        )
    for name in comparison.tasks:
        found += _of_task(name, _count(comparison, name), _title(comparison, name))
    return found


def _of_task(name: str, count: int, title: str) -> list[Column]:
    title, metric = task_title(name, title)
    heading = shown(f"{title} {metric}".strip())

    def task(read: Callable[[TaskScore], Cell]) -> Callable[[Row], Cell]:
        return lambda row: read(row.tasks[name]) if name in row.tasks else NOTHING

    def value(score: TaskScore) -> Cell:
        if not score.is_share:
            return interval(score)
        if score.change is None or score.value is None:
            return interval(score, 100, "%")
        change = interval(score.change, 100)
        sign = "+" if score.change.value > 0 else ""
        return Cell(f"{100 * score.value:.1f}%", f"{sign}{change}")

    def flips(score: TaskScore) -> Cell:
        if score.flips is None:
            return NOTHING
        return Cell(f"-{100 * score.flips.lost.value:.1f} +{100 * score.flips.gained.value:.1f}")

    about = f"accuracy on {count} documents, then the change against the original in points, paired by document"
    return [
        Column(heading, task(value), metric or about),
        Column(f"{heading} flips", task(flips), "points of answers that became wrong, and that became right"),
    ]


def _count(comparison: Comparison, name: str) -> int:
    return max(row.tasks[name].n for row in comparison.rows if name in row.tasks)


def _title(comparison: Comparison, name: str) -> str:
    return next((row.tasks[name].title for row in comparison.rows if name in row.tasks), "")


def _of_speed() -> list[Column]:
    def rate(measure: str, of: Callable[[Speed], Spread]) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            if row.speed is None:
                return NOTHING
            ratio = row.speed.ratio.get(measure)
            shown_ratio = "" if ratio is None else f"x{interval(Interval(ratio.median, ratio.low, ratio.high))}"
            return Cell(significant(of(row.speed).median), shown_ratio)

        return cell

    return [
        Column(
            "tokens/s",
            rate("generation", lambda speed: speed.generation),
            "generated; then as a multiple of the original's in the same run, least and greatest in brackets",
        ),
        Column("prompt tokens/s", rate("prompt", lambda speed: speed.prompt), "read; then as a multiple, too"),
        Column(
            "memory",
            lambda row: NOTHING if row.speed is None else Cell(human_bytes(row.speed.peak_bytes)),
            "the engine's peak while it ran",
        ),
    ]
