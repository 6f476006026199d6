"""Several runs as rows that can be held against each other: what is comparable with what, and what is on the front.

Pure: scorecards in, frozen values out. Terminal, Markdown, CSV, JSON and HTML all show these rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from compress.reading import shown
from compress.report.scorecard import Artifact, LayerError, Scorecard, share_of
from compress.scoring.divergence import Scores
from compress.scoring.intervals import Interval
from compress.scoring.results import Speed, TaskScore, headline

MARKS = "†‡§¶"
SAME = 0.01  # so far may the perplexity of one original differ between two machines


@dataclass(frozen=True)
class Run:
    """A finished run under the name that its rows get; "" takes the recipe's."""

    card: Scorecard
    label: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Row:
    """One line: a variant, or an original.

    share: bytes of all its files over those of the original. scores: on the suite's first text; texts: on
    all of them. mark: "" if its figures compare with those of the other unmarked rows. failed: it did not pass its gate.
    on_front: no other variant that compares is smaller and closer to the original. variant: what tells it from others of its run.
    """

    name: str
    container: str
    bytes: int
    share: float | None
    bits_per_weight: float | None
    scores: Scores | None
    card: Scorecard
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    texts: Mapping[str, Scores] = field(default_factory=dict)
    speed: Speed | None = None
    original: bool = False
    failed: bool = False
    mark: str = ""
    on_front: bool = False
    variant: str | None = None

    @property
    def errors(self) -> tuple[LayerError, ...]:
        """What solving lost in this one, per layer and role."""
        return tuple(error for error in self.card.errors if error.variant in (None, self.variant))

    @property
    def kld(self) -> Interval | None:
        """Mean KL divergence from the original, nats per token."""
        found = None if self.scores is None else self.scores.kld
        return None if found is None else Interval(found.mean, found.low, found.high)

    @property
    def digest(self) -> str | None:
        return None if self.scores is None else self.scores.text_digest

    @property
    def generation(self) -> Interval | None:
        """Generated tokens per second over the original's, medians with the least and greatest."""
        found = None if self.speed is None else self.speed.ratio.get("generation")
        return None if found is None else Interval(found.median, found.low, found.high)


@dataclass(frozen=True)
class Comparison:
    """Originals first, then the variants, the largest first. warnings: why some rows do not compare with the others."""

    model: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    @property
    def originals(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.original)

    @property
    def variants(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.original)

    @property
    def comparable(self) -> tuple[Row, ...]:
        """Variants that passed their gate and were measured on one text beside one original."""
        return tuple(row for row in self.variants if not row.mark and not row.failed and row.kld is not None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have a column, in the order of the suites."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.tasks if headline(name)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of further texts."""
        first = {row.scores.text for row in self.rows if row.scores is not None}
        return tuple(dict.fromkeys(name for row in self.rows for name in row.texts if name not in first))


def compare(runs: Sequence[Run]) -> Comparison:
    """Rows of all artifacts of the runs. Where they are of several originals or were scored on several texts, the largest
    set that is alike counts, the first of equals; rows outside it are marked, and a warning says why."""
    groups = _groups(list(zip(runs, _named(runs), strict=True)))
    main = max(groups, key=lambda group: len(group.rows))
    rows: list[Row] = []
    warnings: list[str] = []
    for group in sorted(groups, key=lambda group: group is not main):
        mark = "" if group is main else _mark(len(warnings))
        if mark and group.rows:
            warnings.append(_warning(mark, group, main))
        original = _original(group, len(groups) > 1)
        rows += [replace(row, mark=mark) for row in [*([original] if original else []), *_with_front(group.rows)]]
    originals = [row for row in rows if row.original]
    variants = sorted((row for row in rows if not row.original), key=lambda row: (-row.bytes, row.name))
    return Comparison(model_name(main.card.model), (*originals, *variants), tuple(warnings))


# ---------------------------------------------------------------- what compares with what


@dataclass
class _Group:
    """Runs of one original, scored on one text (None: on none), and the rows of their artifacts."""

    cards: list[Scorecard]
    rows: list[Row]

    @property
    def card(self) -> Scorecard:
        return self.cards[0]

    @property
    def scores(self) -> Scores | None:
        return next((found for card in self.cards if (found := _first(card)) is not None), None)

    def takes(self, card: Scorecard) -> bool:
        mine, other = self.scores, _first(card)
        if mine is not None and other is not None and mine.text_digest != other.text_digest:
            return False
        if self.card.base.bytes is None or card.base.bytes is None:  # scored on its own: only the text has to agree
            return mine is not None and other is not None
        return same_original(self.card, card)


def same_original(a: Scorecard, b: Scorecard) -> bool:
    """Whether two cards hold variants of one model: name and size say so, and its perplexity where both know it."""
    if (_compared(a), _weights(a), a.base.parameters) != (_compared(b), _weights(b), b.base.parameters):
        return False
    one, other = _first(a), _first(b)
    if one is None or other is None or one.text_digest != other.text_digest:
        return True
    before, after = one.base_perplexity, other.base_perplexity
    return before is None or after is None or math.isclose(before.value, after.value, rel_tol=SAME)


def _compared(card: Scorecard) -> str:
    """Of the original that scores compare with."""
    return model_name(card.base.model or card.model)


def _weights(card: Scorecard) -> int | None:
    """Bytes of the original's weight files."""
    return card.base.bytes if card.base.weight_bytes is None else card.base.weight_bytes


def _groups(runs: Sequence[tuple[Run, Sequence[str]]]) -> list[_Group]:
    """Runs with the names of their artifacts; those with scores first, so that one without any finds the group it belongs to."""
    groups: list[_Group] = []
    for run, names in sorted(runs, key=lambda run: _first(run[0].card) is None):
        group = next((group for group in groups if group.takes(run.card)), None)
        if group is None:
            groups.append(group := _Group([], []))
        group.cards.append(run.card)
        group.rows += [_variant(run.card, a, name) for a, name in zip(run.card.artifacts, names, strict=True)]
    return groups


def _first(card: Scorecard) -> Scores | None:
    return next((artifact.scores for artifact in card.artifacts if artifact.scores is not None), None)


def _mark(number: int) -> str:
    return MARKS[number] if number < len(MARKS) else f"({number + 1})"


def _warning(mark: str, group: _Group, main: _Group) -> str:
    rows = "1 variant is" if len(group.rows) == 1 else f"{len(group.rows)} variants are"
    mine, other = group.scores, main.scores
    if group.card.base.bytes is None:
        what = "of a model that was scored on its own, on another text"
    elif main.card.base.bytes is not None and not same_original(group.card, main.card):
        what = f"of another original ({_compared(group.card)}, {group.card.base.bytes:,} bytes)"
    else:
        what = "scored on another text"
        if mine is not None and other is not None:
            what += f" ({text_facts(mine)}; the others: {text_facts(other)})"
    return f"{mark} {rows} {what}: do not hold its figures against those of unmarked rows."


def text_facts(scores: Scores) -> str:
    """Which text, how much of it."""
    name = f"{shown(scores.text)}, " if scores.text else ""
    return f"{name}{scores.windows} windows of {scores.window_length} tokens, {shown(scores.text_digest)}"


def model_name(model: str) -> str:
    """A hub id with its commit in short, or the last part of a path."""
    path = model.replace("\\", "/").rstrip("/")
    name, _, commit = path.partition("@")
    local = name.startswith(("/", ".", "~", "models/")) or name.count("/") != 1 or ":" in name
    name = PurePosixPath(name).name if local else name
    return shown(f"{name}@{commit[:7]}" if commit else name)


# ---------------------------------------------------------------- rows


def _variant(card: Scorecard, artifact: Artifact, name: str) -> Row:
    return Row(
        name=name,
        container=artifact.container,
        bytes=artifact.bytes,
        share=share_of(artifact, card.base),
        bits_per_weight=artifact.bits_per_weight,
        scores=artifact.scores,
        card=card,
        tasks=artifact.tasks,
        texts=artifact.texts,
        speed=artifact.speed,
        failed=not (card.gate.passed and artifact.delivered),
        variant=artifact.variant,
    )


def _original(group: _Group, several: bool) -> Row | None:
    """The original as its variants' runs saw it; None where all were scored on their own."""
    cards = [card for card in group.cards if card.base.bytes is not None]
    if not cards:
        return None
    bases = [card.base for card in cards]
    scores = [base.scores for base in bases if base.scores is not None]
    scores += [found.of_reference() for card in cards if (found := _first(card)) and found.base_perplexity]
    return Row(
        name=f"original {_compared(cards[0])}" if several else "original",
        container="",
        bytes=bases[0].bytes or 0,
        share=1.0,
        bits_per_weight=bases[0].bits_per_weight,
        scores=scores[0] if scores else None,
        card=cards[0],
        tasks=next((base.tasks for base in bases if base.tasks), {}),
        texts=next((base.texts for base in bases if base.texts), {}),
        speed=next((base.speed for base in bases if base.speed), None),
        original=True,
    )


def _with_front(rows: Sequence[Row]) -> list[Row]:
    """Rows of one group, those marked that no other beats in both bytes and mean divergence."""
    costs = [(row.bytes, kld.value) for row in rows if not row.failed and (kld := row.kld) is not None]
    return [
        replace(
            row,
            on_front=not row.failed
            and (kld := row.kld) is not None
            and not any(a <= row.bytes and b <= kld.value and (a, b) != (row.bytes, kld.value) for a, b in costs),
        )
        for row in rows
    ]  # fmt: skip


def _named(runs: Sequence[Run]) -> list[list[str]]:
    """A name for every artifact of every run: the run's, or where it made several of one container what tells them apart, with
    what tells it from others of that name: container, folder, a number."""
    found = [(run, artifact) for run in runs for artifact in run.card.artifacts]
    names = [_name(run, artifact) for run, artifact in found]
    for details in ([artifact.container for _, artifact in found], [run.folder for run, _ in found]):
        of = {name: {d for n, d in zip(names, details, strict=True) if n == name} for name in names}
        names = [
            f"{name} ({shown(detail)})" if len(of[name]) > 1 and detail else name
            for name, detail in zip(names, details, strict=True)
        ]
    seen: dict[str, int] = {}
    for number, name in enumerate(tuple(names)):
        seen[name] = seen.get(name, 0) + 1
        if names.count(name) > 1 or seen[name] > 1:
            names[number] = f"{name} #{seen[name]}"
    left = iter(names)
    return [[next(left) for _ in run.card.artifacts] for run in runs]


def _name(run: Run, artifact: Artifact) -> str:
    alike = [a for a in run.card.artifacts if a.container == artifact.container]
    if artifact.variant is None or len(alike) == 1:
        return shown(run.label or run.card.recipe)
    return shown(f"{run.label} {artifact.variant}".strip())


# ---------------------------------------------------------------- means over tasks


def accuracy_change(row: Row, tasks: Iterable[str]) -> Interval | None:
    """Mean over tasks of the change of accuracy against the original; tasks have documents of their own, so their
    intervals' widths add in squares. None unless all were measured."""
    changes = [row.tasks[name].change if name in row.tasks else None for name in tasks]
    found = [change for change in changes if change is not None]
    if not changes or len(found) < len(changes):
        return None
    mean = math.fsum(change.value for change in found) / len(found)
    if any(change.low is None or change.high is None for change in found):
        return Interval(mean)
    below = math.hypot(*(change.value - change.low for change in found if change.low is not None)) / len(found)
    above = math.hypot(*(change.high - change.value for change in found if change.high is not None)) / len(found)
    return Interval(mean, mean - below, mean + above)


def accuracies(comparison: Comparison) -> tuple[str, ...]:
    """Tasks whose change enters the mean: those of right and wrong answers that every comparable variant has."""
    rows = comparison.comparable
    return tuple(
        name
        for name in comparison.tasks
        if all(name in row.tasks and row.tasks[name].is_share and row.tasks[name].change for row in rows)
    )


# ---------------------------------------------------------------- no paths of this machine

_PATH = re.compile(r"(?<![\w.<:/\\])(?:~|[A-Za-z]:)?(?:[/\\][^\s'\",;:()<>\[\]|/\\]+){2,}[/\\]?")


def without_paths(text: str, *paths: str) -> str:
    """A line of a scorecard for a page that travels: of every absolute path, and of `paths`, only the last part."""
    for path in sorted(
        (path for path in paths if len(path) > 1 and ("/" in path or "\\" in path)), key=len, reverse=True
    ):
        text = text.replace(path, model_name(path))
    return _PATH.sub(lambda match: PurePosixPath(match[0].replace("\\", "/").rstrip("/")).name, text)
