"""Tables for people: one run's scorecard, and several runs side by side (terminal and Markdown).

Square brackets after an estimate hold its 95% interval. A dash means "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.report.scorecard import Artifact, Base, Scorecard
from compress.scoring.divergence import Scores
from compress.scoring.results import TaskScore

DASH = "–"
SHOWN_LAYERS = 8
SHOWN_FALLBACKS = 8


# ---------------------------------------------------------------- numbers as text


def human_bytes(count: int | float | None) -> str:
    """1536 -> "1.5 KiB"; three significant digits, binary units."""
    if count is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{_significant(count)} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _significant(value: float | None, digits: int = 3) -> str:
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "∞"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # 0.9999 has the decimals of 1.00
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 8)}f}"


def _estimate(value: float | None, low: float | None, high: float | None, scale: float = 1.0, unit: str = "") -> str:
    """Like 12.34 [11.90, 12.81]: enough decimals to show the interval's second digit."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "∞"
    value *= scale
    if low is None or high is None or not math.isfinite(high):
        return f"{_significant(value, 4)}{unit}"
    low, high = low * scale, high * scale
    if 0 < abs(value) < 1e-4:
        return f"{value:.2e}{unit} [{low:.2e}, {high:.2e}]"
    width = high - low
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6) if width > 0 else (1 if unit == "%" else 4)
    return f"{value:.{decimals}f}{unit} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _interval(interval: Any, scale: float = 1.0, unit: str = "") -> str:
    return DASH if interval is None else _estimate(interval.value, interval.low, interval.high, scale, unit)


def _task(score: TaskScore | None) -> str:
    if score is None:
        return DASH
    if score.metric.startswith("acc"):
        return _estimate(score.value, score.low, score.high, 100, "%")
    return _estimate(score.value, score.low, score.high)


# ---------------------------------------------------------------- one run


def scorecard_table(scorecard: Scorecard) -> RenderableType:
    """Everything a person wants to know after a run; fits 100 columns with up to two artifacts."""
    parts: list[RenderableType] = [
        Text.assemble((scorecard.model, "bold"), "  ·  recipe ", (scorecard.recipe, "bold")),
        _main_table(scorecard),
    ]  # fmt: skip
    if facts := _evaluation_facts(scorecard):
        parts.append(Text(facts, style="dim"))
    if scorecard.experts:
        parts += ["", _expert_table(scorecard)]
    if scorecard.stages:
        parts += ["", _stage_table(scorecard)]
    parts += ["", _fallback_lines(scorecard), _gate_lines(scorecard)]
    parts += [Text(f"Note: {note}") for note in scorecard.notes]
    return Group(*parts)


def _main_table(scorecard: Scorecard) -> Table:
    known = scorecard.base.bytes is not None  # a model scored on its own has no original beside it
    columns: list[Base | Artifact] = [*([scorecard.base] if known else ()), *scorecard.artifacts]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    if known:
        table.add_column("original", justify="right")
    for artifact in scorecard.artifacts:
        table.add_column(artifact.container, justify="right", overflow="fold")

    def row(label: str, cells: Sequence[str], section: bool = False) -> None:
        if any(cell != DASH for cell in cells):
            table.add_row(label, *cells, end_section=section)

    def scored(read: Any) -> list[str]:
        return [DASH if column.scores is None else read(column.scores) for column in columns]

    def divergence(read: Any) -> list[str]:
        return scored(lambda scores: DASH if scores.kld is None else read(scores.kld))

    row("size", [human_bytes(column.bytes) for column in columns])
    row("bytes", [f"{column.bytes:,}" for column in columns])
    row("bits per weight", [_bits(column.bits_per_weight) for column in columns])
    shares = [_share(artifact, scorecard.base) for artifact in scorecard.artifacts]
    row("share of original", ["100%", *shares] if known else shares, True)
    row("perplexity", scored(lambda scores: _interval(scores.perplexity)))
    row("  ratio to original", scored(lambda scores: _interval(scores.perplexity_ratio)))
    row("KL divergence, mean", divergence(lambda kld: _estimate(kld.mean, kld.low, kld.high)))
    row("  median", divergence(lambda kld: _significant(kld.median)))
    row(
        "  99% · 99.9% · max",
        divergence(lambda kld: " · ".join(map(_significant, (kld.p99, kld.p999, kld.max)))),
    )
    row("same top-1 token", scored(lambda scores: _interval(scores.top1_agreement, 100, "%")))
    row("scored by", scored(lambda scores: scores.engine), True)
    names = dict.fromkeys(name for column in columns for name in column.tasks if _headline(name))
    for name in names:
        row(_task_label(name, columns), [_task(column.tasks.get(name)) for column in columns])
        changes = [_change(column.tasks.get(name)) for column in columns]
        row("  change", changes)
    return table


def _bits(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _share(artifact: Artifact, base: Base) -> str:
    ratio = artifact.ratio
    if ratio is None and base.bytes:
        ratio = artifact.bytes / base.bytes
    return DASH if not ratio else f"{100 * ratio:.1f}% (1/{1 / ratio:.1f})"


def _headline(task: str) -> bool:
    """Per-phenomenon rows ("blimp.island_effects") stay in scorecard.json; the table has the totals."""
    return "." not in task or task.endswith(".perplexity")


def _task_label(name: str, columns: Sequence[Base | Artifact]) -> str:
    count = next((column.tasks[name].n for column in columns if name in column.tasks), 0)
    title, _, metric = name.partition(".")
    known = {"blimp": "BLiMP", "lambada": "LAMBADA"}.get(title, title)
    return f"  {metric}" if metric else f"{known} accuracy ({count})"


def _change(score: TaskScore | None) -> str:
    if score is None or not score.difference:
        return DASH
    change = score.difference
    return _estimate(change.get("value"), change.get("low"), change.get("high"), 100, " points")


def _evaluation_facts(scorecard: Scorecard) -> str:
    scores = next((artifact.scores for artifact in scorecard.artifacts if artifact.scores), scorecard.base.scores)
    if scores is None:
        return ""
    return (
        f"Token perplexity, {scores.windows} windows of {scores.window_length} tokens, stride "
        f"{scores.stride},\ntokenizer {scores.tokenizer}, text {scores.text_digest}. "
        "KL divergence in nats per token.\n"
        "[low, high]: 95% intervals; the independent units are documents of the texts and of the tasks."
    )


def _expert_table(scorecard: Scorecard) -> Table:
    layers = list(scorecard.experts)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("tokens per expert")
    for heading in ("experts", "min", "median", "max"):
        table.add_column(heading, justify="right")
    table.add_column("cold experts (share borrowed from the layer)", overflow="fold")
    if len(layers) > SHOWN_LAYERS:
        everything = [count for layer in layers for count in layer.tokens]
        cold = sum(len(layer.cold) for layer in layers)
        table.add_row(
            f"all {len(layers)} layers",
            str(len(everything)),
            *_spread(everything),
            str(cold) if cold else "none",
        )
        layers = sorted((layer for layer in layers if layer.cold), key=lambda layer: min(layer.tokens))[:SHOWN_LAYERS]
    for layer in layers:
        names = ", ".join(_cold(layer, expert) for expert in layer.cold[:6])
        names += f" and {len(layer.cold) - 6} more" if len(layer.cold) > 6 else ""
        table.add_row(f"layer {layer.layer}", str(len(layer.tokens)), *_spread(layer.tokens), names or "none")
    return table


def _spread(counts: Sequence[int]) -> tuple[str, str, str]:
    return (f"{min(counts):,}", f"{median(counts):,.0f}", f"{max(counts):,}") if counts else (DASH, DASH, DASH)


def _cold(layer: Any, expert: int) -> str:
    return f"{expert} ({100 * layer.borrowed[expert]:.0f}%)" if expert < len(layer.borrowed) else str(expert)


def _stage_table(scorecard: Scorecard) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage")
    table.add_column("wall time", justify="right")
    table.add_column("peak memory", justify="right")
    for stage in scorecard.stages:
        table.add_row(stage.name, human_seconds(stage.seconds), human_bytes(stage.peak_bytes))
    if len(scorecard.stages) > 1:
        peaks = [stage.peak_bytes for stage in scorecard.stages if stage.peak_bytes is not None]
        table.add_section()
        total = sum(stage.seconds for stage in scorecard.stages)
        table.add_row("total", human_seconds(total), human_bytes(max(peaks, default=None)))
    return table


def _fallback_lines(scorecard: Scorecard) -> RenderableType:
    if not scorecard.fallbacks:
        return Text("Fallbacks: none")
    # One line per kind: a row length that does not divide befalls every layer alike.
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for fallback in scorecard.fallbacks:
        kinds.setdefault((fallback.wanted, fallback.used, fallback.reason), []).append(fallback.subject)
    lines = [Text(f"Fallbacks: {len(scorecard.fallbacks)}")]
    for (wanted, used, reason), subjects in list(kinds.items())[:SHOWN_FALLBACKS]:
        more = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
        lines.append(Text(f"  {subjects[0]}{more}: {wanted} -> {used} ({reason})"))
    if len(kinds) > SHOWN_FALLBACKS:
        lines.append(Text(f"  and {len(kinds) - SHOWN_FALLBACKS} more kinds in scorecard.json"))
    return Group(*lines)


def _gate_lines(scorecard: Scorecard) -> RenderableType:
    gate = scorecard.gate
    verdict = ("passed", "bold green") if gate.passed else ("FAILED", "bold red")
    done = f" ({sum(check.passed for check in gate.checks)} of {len(gate.checks)} checks)" if gate.checks else ""
    lines = [Text.assemble("Integrity gate: ", verdict, done)]
    for check in gate.checks:
        mark = ("  ok   ", "green") if check.passed else ("  FAIL ", "red")
        lines.append(Text.assemble(mark, check.name, f": {check.detail}" if check.detail else ""))
    if not gate.passed:
        lines.append(Text("The artifact is marked as failed and was not given its final name.", style="red"))
    return Group(*lines)


# ---------------------------------------------------------------- several runs


@dataclass(frozen=True)
class Row:
    """One artifact of one run. `group` is what makes two rows comparable: model, text and window length."""

    scorecard: Scorecard
    artifact: Artifact
    group: tuple[str, str]
    on_front: bool


def compare_rows(scorecards: Sequence[Scorecard]) -> list[Row]:
    """Every artifact, smallest first; on_front marks those that no other artifact of the same model, scored
    on the same text, beats in both bytes and mean KL divergence. Artifacts without KL, or that failed their
    gate, are neither on the front nor rivals."""
    rows = [
        Row(card, artifact, (card.model, artifact.scores.text_digest if artifact.scores else ""), False)
        for card in scorecards
        for artifact in card.artifacts
    ]
    marked = []
    for row in rows:
        mine = _cost(row)
        rivals = [cost for other in rows if other.group == row.group and (cost := _cost(other)) is not None]
        beaten = mine is None or any(_dominates(rival, mine) for rival in rivals)
        marked.append(replace(row, on_front=not beaten))
    return sorted(marked, key=lambda row: (row.artifact.bytes, row.scorecard.recipe))


def _cost(row: Row) -> tuple[int, float] | None:
    scores = row.artifact.scores
    if scores is None or scores.kld is None or _failed(row):
        return None
    return row.artifact.bytes, scores.kld.mean


def _dominates(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


_HEADINGS = ("", "recipe", "container", "size", "bits", "share", "ppl", "top-1", "KL mean [95%]", "KL 99.9%")


def _cells(row: Row) -> tuple[str, ...]:
    artifact, scores = row.artifact, row.artifact.scores
    kld = scores.kld if scores else None
    base = row.scorecard.base
    return (
        "!" if _failed(row) else "*" if row.on_front else "",
        row.scorecard.recipe,
        artifact.container,
        human_bytes(artifact.bytes),
        _bits(artifact.bits_per_weight),
        f"{100 * artifact.bytes / base.bytes:.1f}%" if base.bytes else DASH,
        _significant(scores.perplexity.value, 4) if scores else DASH,
        _top1(scores),
        _estimate(kld.mean, kld.low, kld.high) if kld else DASH,
        _significant(kld.p999) if kld else DASH,
    )


def _failed(row: Row) -> bool:
    return not (row.scorecard.gate.passed and row.artifact.delivered)


def _top1(scores: Scores | None) -> str:
    return DASH if scores is None or scores.top1_agreement is None else f"{100 * scores.top1_agreement.value:.1f}%"


def _base_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line per distinct original, with its perplexity on the text its variants were scored on."""
    originals: dict[tuple[str, str], tuple[str, ...]] = {}
    several = len({row.scorecard.model for row in rows}) > 1
    for row in rows:
        name = f"original {row.scorecard.model}" if several else "original"
        base, scores = row.scorecard.base, row.artifact.scores
        if base.bytes is None:
            continue
        before = scores.base_perplexity if scores and scores.base_perplexity else None
        if before is None and base.scores:
            before = base.scores.perplexity
        originals[row.group] = (
            "", name, DASH, human_bytes(base.bytes), _bits(base.bits_per_weight), "100%",
            _significant(before.value, 4) if before else DASH, DASH, DASH, DASH,
        )  # fmt: skip
    return list(originals.values())


def _compare_notes(rows: Sequence[Row]) -> list[str]:
    notes = ["* on the front: nothing else for this model and text is both smaller and closer to the original"]
    if any(map(_failed, rows)):
        notes.append("! failed its integrity gate; never on the front")
    if len({row.group for row in rows}) > 1:
        notes.append("Rows differ in model or evaluation text: compare only rows of one model and one text.")
    if len({row.artifact.scores.engine for row in rows if row.artifact.scores}) > 1:
        engines = ", ".join(sorted({row.artifact.scores.engine for row in rows if row.artifact.scores}))
        notes.append(f"Scored by different engines: {engines}.")
    return notes


def compare_table(scorecards: Sequence[Scorecard]) -> RenderableType:
    """One row per artifact over several runs, smallest first, for a terminal of 100 columns."""
    rows = compare_rows(scorecards)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    # The last Markdown column does not fit beside a full interval.
    for index, heading in enumerate(_HEADINGS[:-1]):
        table.add_column(heading, justify="left" if index < 3 else "right", overflow="fold", no_wrap=index != 1)
    table.columns[1].min_width = 12
    for row in rows:
        table.add_row(*_cells(row)[:-1], style="bold" if row.on_front else "")
    table.add_section()
    for cells in _base_cells(rows):
        table.add_row(*cells[:-1], style="dim")
    return Group(table, *(Text(note, style="dim") for note in _compare_notes(rows)))


def compare_markdown(scorecards: Sequence[Scorecard]) -> str:
    """The table of `compare_table` as GitHub Markdown, ending with a newline."""
    rows = compare_rows(scorecards)
    lines = [
        "| " + " | ".join(_HEADINGS) + " |",
        "|" + "|".join("---" if index < 3 else "---:" for index in range(len(_HEADINGS))) + "|",
    ]
    for cells in [*map(_cells, rows), *_base_cells(rows)]:
        # a bare asterisk and pipes mean something in Markdown
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    notes = [note.replace("*", "\\*") for note in _compare_notes(rows)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes[:-1]), notes[-1], ""])
