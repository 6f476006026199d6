"""Sections of a model card in Markdown: what was measured, what the calibration text was to the experts, how it was made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from statistics import median

from compress.models.companions import is_legal
from compress.report.columns import columns
from compress.report.compare import Comparison
from compress.report.reproduction import Reproduction
from compress.report.scorecard import REPRODUCE_FILE, Scorecard
from compress.report.table import fallback_line

SHOWN_LAYERS, SHOWN_KINDS = 8, 20
MOST_BESIDE = 3  # artifacts whose scores stand beside each other; more stand below each other


def escaped(text: object) -> str:
    """A line without what means something in Markdown or HTML; bold is left, and underscores within words, which mean nothing."""
    return re.sub(r"[\\`|<>]|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", str(text))


def code(text: str) -> str:
    """A name as it is typed."""
    return f"`{text.replace('`', chr(39)).replace('|', '')}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *words: int) -> str:
    """Cells in Markdown; words: columns that are text, by number, the others are figures."""
    rules = ["---" if n in words or n - len(heads) in words else "---:" for n in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


# ---------------------------------------------------------------- how close it is


def scores(comparison: Comparison) -> str:
    """All that was measured: beside each other where they are few, else a line each."""
    shown = [column for column in columns(comparison) if not column.left]
    names = [escaped(row.name) for row in comparison.rows]
    if len(comparison.variants) > MOST_BESIDE:
        lines = [[n, *(str(c.cell(row)) for c in shown)] for n, row in zip(names, comparison.rows, strict=True)]
        about = [f"- {escaped(column.heading)}: {escaped(column.about)}" for column in shown if column.about]
        return "\n".join([table(["", *(escaped(column.heading) for column in shown)], lines, 0), "", *about])
    lines = [
        [escaped(column.heading), *(str(column.cell(row)) for row in comparison.rows), escaped(column.about)]
        for column in shown
    ]
    return table(["", *names, "what it is"], lines, 0, -1)


def checked(card: Scorecard) -> str:
    checks = [escaped(check.name) for check in card.gate.checks if check.passed]
    if not checks:
        return "It was not checked before it was delivered."
    return f"Checked before it was delivered; {len(checks)} of {len(card.gate.checks)} passed: {', '.join(checks)}."


def experts(card: Scorecard) -> Iterator[str]:
    """What the calibration text was to the experts."""
    if not card.experts:
        return
    counts = [count for layer in card.experts for count in layer.tokens]
    cold = [layer for layer in card.experts if layer.cold]
    sizes = sorted({len(layer.tokens) for layer in card.experts})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    layers = "one layer" if len(card.experts) == 1 else f"each of {len(card.experts)} layers"
    yield (
        f"{each} experts in {layers} were calibrated with the tokens that the router sent them: "
        f"{min(counts):,} the fewest, {median(counts):,.0f} the median, {max(counts):,} the most."
    )
    if not cold:
        yield "All saw enough of them to stand on their own statistics."
        return
    many = sum(len(layer.cold) for layer in cold)
    yield f"{many} of {len(counts)} saw so few that most of their statistics are their layer's:\n"
    for layer in cold[:SHOWN_LAYERS]:
        yield f"- layer {layer.layer}: {', '.join(map(str, layer.cold))}"
    if len(cold) > SHOWN_LAYERS:
        yield f"- and in {len(cold) - SHOWN_LAYERS} more layers"


def fallbacks(card: Scorecard, clean: Callable[[str], str]) -> Iterator[str]:
    kinds = card.fallback_kinds
    for first, count in kinds[:SHOWN_KINDS]:
        cure = f"; avoided by {first.cure}" if first.cure else ""
        yield clean(fallback_line(first, count).replace("->", "→") + cure)
    if len(kinds) > SHOWN_KINDS:
        yield f"and {len(kinds) - SHOWN_KINDS} more kinds in scorecard.json"


# ---------------------------------------------------------------- how it was made


def making(card: Scorecard, made: Reproduction) -> str:
    """Calibration, versions, machine."""
    text, lines = card.calibration, []
    if text:
        seed = made.recipe.get("seed", 0)
        lines.append(
            f"Calibration text: {code(str(text.get('dataset')))}, {text.get('samples')} windows of {text.get('length')} tokens, "
            f"seed {seed}" + (f"; sha256 of the windows {code(made.calibration)}." if made.calibration else ".")
        )
    else:
        lines.append("No calibration text was read.")
    if card.versions:
        lines.append(f"Versions: {escaped(', '.join(f'{name} {found}' for name, found in card.versions.items()))}.")
    machine = card.machine
    if machine:
        lines.append(
            escaped(
                f"Machine: {machine.get('cpu')}, {machine.get('threads')} threads, {machine.get('device')}, "
                f"products of {machine.get('products', 'float32')}, Python {machine.get('python')}, {machine.get('system')}."
            )
        )
    return "\n\n".join(lines)


def reproducing(card: Scorecard, made: Reproduction, repo: str, alone: bool) -> str:
    version, target = card.versions.get("compress"), repo or REPRODUCE_FILE
    pinned = f"=={version}" if version else ""
    told = (
        "It compares the original's files with those that this was made from, carries the recipe out again and compares the "
        "sha256 of every file. The bytes are the same with the same versions, on the same kind of processor or device, with as "
        "many threads; otherwise it says what differs."
    )
    if not made.original.commit:
        told += " The original is known by its name and checksums: `--model` says where it lies."
    where = f"With the `{REPRODUCE_FILE}` of the run that made this folder:\n\n" if alone else ""
    return f"{where}```sh\npip install compress-llm{pinned}\ncompress reproduce {target}\n```\n\n{told}"


def licence(card: Scorecard, made: Reproduction) -> str:
    of = made.original
    name = of.license_name or of.license
    told = "No model card of the original names a licence; its own terms hold."
    if name:
        link = f", {escaped(of.license_link)}" if of.license_link else ""
        told = f"{escaped(' '.join(name.split()))}{link}, says the original's model card."
    carried = sorted({name for file in card.files if is_legal(name := PurePosixPath(file).name)})
    return told + (f" Carried along from the original: {', '.join(map(code, carried))}." if carried else "")
