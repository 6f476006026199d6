"""The table of one run, for people in a terminal of any width.

Square brackets after an estimate hold its 95% interval. A dash means "not measured".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

from compress.report.layout import GAP, Grid, Head, Line, Prose, narrowest
from compress.report.numbers import (
    DASH,
    NOTHING,
    Cell,
    bits,
    estimate,
    human_bytes,
    human_seconds,
    interval,
    significant,
)
from compress.report.scorecard import Artifact, Base, Scorecard, share_of
from compress.scoring.divergence import Scores
from compress.scoring.results import Fallback, Speed, TaskScore, headline, task_title

NAMES = 16  # columns that what was measured may be folded to
SHOWN_LAYERS = 8
SHOWN_FALLBACKS = 8


def _task(score: TaskScore | None) -> Cell:
    return interval(score, 100, "%") if score is not None and score.is_share else interval(score)


def scorecard_table(scorecard: Scorecard) -> RenderableType:
    """Everything a person wants to know after a run, for any width."""
    parts: list[RenderableType] = [
        Prose(Text.assemble((scorecard.model, "bold"), "  ·  recipe ", (scorecard.recipe, "bold"))),
        Figures(scorecard),
    ]
    if facts := evaluation_facts(scorecard):
        parts.append(Prose(facts, "dim", indent=0))
    if scorecard.experts:
        parts += ["", _expert_table(scorecard)]
    if scorecard.stages:
        parts += ["", _stage_table(scorecard)]
    parts += ["", *_fallback_lines(scorecard), *_gate_lines(scorecard)]
    parts += [Prose(f"Note: {note}") for note in scorecard.notes]
    return Group(*parts)


class Figures:
    """What was measured, a column for the original and each artifact; those that do not fit beside each other go on below."""

    def __init__(self, scorecard: Scorecard):
        known = scorecard.base.bytes is not None  # a model scored on its own has no original beside it
        self.heads = [
            *(["original"] if known else []),
            *(artifact.variant or artifact.container for artifact in scorecard.artifacts),
        ]
        self.lines = _figures(scorecard, known)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = max((cell_len(line.cells[0]) for line in self.lines), default=0)
        for number, group in enumerate(self._groups(options.max_width - names)):
            if number:
                yield Text()
            heads = [Head("", right=False, folds=min(names, NAMES))]
            heads += [Head(self.heads[n - 1], folds=self._least(n)) for n in group]
            yield Grid(heads, [replace(line, cells=tuple(line.cells[n] for n in (0, *group))) for line in self.lines])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), options.max_width)

    def _least(self, n: int) -> int:
        return max(map(narrowest, (self.heads[n - 1], *(line.cells[n] for line in self.lines))))

    def _groups(self, room: int) -> list[list[int]]:
        """Numbers of the columns that stand beside each other."""
        groups: list[list[int]] = [[]]
        left = room
        for n in range(1, len(self.heads) + 1):
            if (wanted := self._least(n) + GAP) > left and groups[-1]:
                groups.append([])
                left = room
            groups[-1].append(n)
            left -= wanted
        return groups


def _figures(scorecard: Scorecard, known: bool) -> list[Line]:
    """A line for everything that was measured of any column."""
    columns: list[Base | Artifact] = [*([scorecard.base] if known else ()), *scorecard.artifacts]
    lines: list[Line] = []

    def row(label: str, cells: Sequence[str | Cell], section: bool = False) -> None:
        shown = [str(cell) for cell in cells]
        if any(cell != DASH for cell in shown):
            lines.append(Line((label, *shown), section=section))

    def scored(read: Any) -> list[str | Cell]:
        return [DASH if column.scores is None else read(column.scores) for column in columns]

    def divergence(read: Any) -> list[str | Cell]:
        return scored(lambda scores: DASH if scores.kld is None else read(scores.kld))

    row("size", [human_bytes(column.bytes) for column in columns])
    row("bytes", [f"{column.bytes:,}" for column in columns])
    row("bits per weight", [bits(column.bits_per_weight) for column in columns])
    shares = [_share(artifact, scorecard.base) for artifact in scorecard.artifacts]
    row("share of original", ["100%", *shares] if known else shares, True)
    row("perplexity", scored(lambda scores: interval(scores.perplexity)))
    row("  per word", scored(lambda scores: interval(scores.word_perplexity)))
    row("  per byte", scored(lambda scores: interval(scores.byte_perplexity)))
    row("  ratio to original", scored(lambda scores: interval(scores.perplexity_ratio)))
    row("KL divergence, mean", divergence(lambda kld: estimate(kld.mean, kld.low, kld.high)))
    row("  median", divergence(lambda kld: significant(kld.median)))
    row(
        "  99% · 99.9% · max",
        divergence(lambda kld: " · ".join(map(significant, (kld.p99, kld.p999, kld.max)))),
    )
    row("same top-1 token", scored(lambda scores: interval(scores.top1_agreement, 100, "%")))
    for label, cells in _text_rows(columns):
        row(label, cells)
    row("scored by", scored(lambda scores: scores.engine), True)
    names = dict.fromkeys(name for column in columns for name in column.tasks if headline(name))
    for name in names:
        row(_label(name, columns), [_task(column.tasks.get(name)) for column in columns])
        row("  change", [_change(column.tasks.get(name)) for column in columns])
        row("  lost · gained", [_flips(column.tasks.get(name)) for column in columns])
    if names:
        lines[-1] = replace(lines[-1], section=True)
    for label, cells in _speed_rows(columns):
        row(label, cells)
    lines[-1] = replace(lines[-1], section=False)
    return lines


def _text_rows(columns: Sequence[Base | Artifact]) -> Iterator[tuple[str, list[str | Cell]]]:
    """Every text behind the first, whose figures stand above."""
    first = {column.scores.text for column in columns if column.scores is not None}
    for name in dict.fromkeys(name for column in columns for name in column.texts if name not in first):
        found = [column.texts.get(name) for column in columns]
        yield f"{name}, perplexity", [DASH if one is None else interval(one.perplexity) for one in found]
        yield (
            "  KL divergence",
            [
                DASH if one is None or one.kld is None else estimate(one.kld.mean, one.kld.low, one.kld.high)
                for one in found
            ],
        )


def _speed_rows(columns: Sequence[Base | Artifact]) -> Iterator[tuple[str, list[str | Cell]]]:
    """Throughput, each figure with its multiple of the original's in the same run."""
    for label, measure, unit in (
        ("prompt tokens/s", "prompt", ""), ("generated tokens/s", "generation", ""),
        ("time to first token", "first_token", " s"), ("time to load", "load", " s"),
    ):  # fmt: skip
        yield label, [_rate(column.speed, measure, unit) for column in columns]
    yield "peak memory", [DASH if c.speed is None else human_bytes(c.speed.peak_bytes) for c in columns]
    yield "timed in", [DASH if c.speed is None else c.speed.engine for c in columns]


def _rate(speed: Speed | None, measure: str, unit: str) -> str:
    if speed is None:
        return DASH
    ratio = speed.ratio.get(measure)
    return f"{significant(getattr(speed, measure).median)}{unit}" + (
        "" if ratio is None else f" (x{significant(ratio.median, 2)})"
    )


def _flips(score: TaskScore | None) -> str:
    """Shares of documents that changed sides."""
    if score is None or score.flips is None:
        return DASH
    return f"{100 * score.flips.lost.value:.1f}% · {100 * score.flips.gained.value:.1f}%"


def _share(artifact: Artifact, base: Base) -> str:
    ratio = share_of(artifact, base)
    return DASH if not ratio else f"{100 * ratio:.1f}% (1/{1 / ratio:.1f})"


def _label(name: str, columns: Sequence[Base | Artifact]) -> str:
    row = next(column.tasks[name] for column in columns if name in column.tasks)
    title, metric = task_title(name, row.title)
    return f"  {metric}" if metric else f"{title} accuracy ({row.n})"


def _change(score: TaskScore | None) -> Cell:
    return NOTHING if score is None else interval(score.change, 100, " points")


def _kept(scores: Scores) -> str:
    """How exactly it was measured, where not over all tokens one by one."""
    if scores.kept_tokens is None:
        return ""
    return f", from the original's {scores.kept_tokens:,} likeliest tokens at every place and a sample of the rest"


def evaluation_facts(scorecard: Scorecard) -> str:
    """What was scored and how, in two lines; "" where nothing was."""
    scores = next((artifact.scores for artifact in scorecard.artifacts if artifact.scores), scorecard.base.scores)
    if scores is None:
        return ""
    return (
        f"Token perplexity, {scores.windows} windows of {scores.window_length} tokens, stride {scores.stride}, "
        f"tokenizer {scores.tokenizer}, text {scores.text_digest}. KL divergence in nats per token{_kept(scores)}.\n"
        "[low, high]: 95% intervals; the independent units are documents of the texts and of the tasks."
    )


def _expert_table(scorecard: Scorecard) -> Grid:
    layers, lines = list(scorecard.experts), []
    if len(layers) > SHOWN_LAYERS:
        everything = [count for layer in layers for count in layer.tokens]
        cold = sum(len(layer.cold) for layer in layers)
        name = f"all {len(layers)} layers"
        lines.append(Line((name, str(len(everything)), *_spread(everything), str(cold) if cold else "none")))
        layers = sorted((layer for layer in layers if layer.cold), key=lambda layer: min(layer.tokens))[:SHOWN_LAYERS]
    for layer in layers:
        names = ", ".join(_cold(layer, expert) for expert in layer.cold[:6])
        names += f" and {len(layer.cold) - 6} more" if len(layer.cold) > 6 else ""
        count = str(len(layer.tokens))
        lines.append(Line((f"layer {layer.layer}", count, *_spread(layer.tokens), names or "none")))
    heads = (
        Head("tokens per expert", right=False),
        *(Head(heading) for heading in ("experts", "min", "median", "max")),
        Head("cold experts (share borrowed from the layer)", right=False, folds=14),
    )
    return Grid(heads, lines)


def _spread(counts: Sequence[int]) -> tuple[str, str, str]:
    return (f"{min(counts):,}", f"{median(counts):,.0f}", f"{max(counts):,}") if counts else (DASH, DASH, DASH)


def _cold(layer: Any, expert: int) -> str:
    return f"{expert} ({100 * layer.borrowed[expert]:.0f}%)" if expert < len(layer.borrowed) else str(expert)


def _stage_table(scorecard: Scorecard) -> Grid:
    stages = scorecard.stages
    lines = [Line((stage.name, human_seconds(stage.seconds), human_bytes(stage.peak_bytes))) for stage in stages]
    if len(stages) > 1:
        peaks = [stage.peak_bytes for stage in stages if stage.peak_bytes is not None]
        total = sum(stage.seconds for stage in stages)
        lines[-1] = replace(lines[-1], section=True)
        lines.append(Line(("total", human_seconds(total), human_bytes(max(peaks, default=None)))))
    return Grid((Head("stage", right=False), Head("wall time"), Head("peak memory")), lines)


def _fallback_lines(scorecard: Scorecard) -> Iterator[RenderableType]:
    if not scorecard.fallbacks:
        yield Text("Fallbacks: none")
        return
    kinds = scorecard.fallback_kinds
    yield Text(f"Fallbacks: {len(scorecard.fallbacks)}")
    for first, count in kinds[:SHOWN_FALLBACKS]:
        yield Prose(f"  {fallback_line(first, count)}", indent=4)
    if len(kinds) > SHOWN_FALLBACKS:
        yield Text(f"  and {len(kinds) - SHOWN_FALLBACKS} more kinds in scorecard.json")
    for cure in dict.fromkeys(first.cure for first, _ in kinds if first.cure):
        yield Prose(f"  avoided by {cure}", indent=4)


def fallback_line(first: Fallback, count: int) -> str:
    """One of `Scorecard.fallback_kinds` in words."""
    several = "" if count == 1 else f" ({count})" if first.role else f" and {count - 1} more"
    return f"{first.subject}{several}: {first.wanted} -> {first.used} ({first.reason})"


def _gate_lines(scorecard: Scorecard) -> Iterator[RenderableType]:
    gate = scorecard.gate
    verdict = ("passed", "bold green") if gate.passed else ("FAILED", "bold red")
    done = f" ({sum(check.passed for check in gate.checks)} of {len(gate.checks)} checks)" if gate.checks else ""
    yield Text.assemble("Integrity gate: ", verdict, done)
    for check in gate.checks:
        mark = ("  ok   ", "green") if check.passed else ("  FAIL ", "red")
        yield Prose(Text.assemble(mark, check.name, f": {check.detail}" if check.detail else ""), indent=7)
    if not gate.passed:
        yield Prose("The artifact is marked as failed and was not given its final name.", "red")
