"""Which one should I take? Rules that turn rows into sentences, with the uncertainty in them.

Closer is the smaller mean KL divergence. Two variants are told apart only where their 95% intervals do not overlap: the
scorecards hold each variant's own interval, not that of their difference on the same text, so this errs on the side of
"not distinguishable".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.report.compare import Comparison, Row
from compress.report.numbers import human_bytes, interval, percent

STEPS = ((2, "half"), (3, "a third"), (4, "a quarter"), (6, "a sixth"), (8, "an eighth"), (16, "a sixteenth"))
WITHIN = (0.01, 0.02, 0.05, 0.1)
"""How much higher the perplexity of a variant may be that is recommended to somebody without a limit: the first of these
that any variant keeps, by the upper end of its interval."""

NO_SMALLER = 0.99  # of the original: a file for another engine, not a smaller model


@dataclass(frozen=True)
class Advice:
    """headline: the answer in a sentence; steps: by size; dominated: variants that another one beats in both ways."""

    headline: str
    steps: tuple[str, ...] = ()
    dominated: tuple[str, ...] = ()
    picks: tuple[str, ...] = ()
    """Names of the variants that the headline says to take: one or none."""

    @property
    def sentences(self) -> tuple[str, ...]:
        return (self.headline, *self.steps, *self.dominated)


def advise(comparison: Comparison, memory: int | None = None, said: str = "") -> Advice:
    """memory: bytes that the model may take, and how its owner put that."""
    rows = sorted(comparison.comparable, key=lambda row: (row.bytes, _divergence(row)))
    if not rows:
        return Advice("No recommendation: no variant that passed its gate was scored against its original.")
    dominated = tuple(_dominated(rows))
    if memory is not None:
        return _within(rows, memory, said or human_bytes(memory), dominated)
    rows = [row for row in rows if row.share is None or row.share < NO_SMALLER] or rows
    if len(rows) == 1:
        return Advice(f"Only one variant to choose: {_facts(rows[0])}.", picks=(rows[0].name,))
    picked, why = _default(rows)
    headline = f"Take {picked.name}: {why} ({_figures(picked)})."
    return Advice(headline, tuple(_by_size(comparison, rows)), dominated, (picked.name,))


def distinguishable(a: Row, b: Row) -> bool:
    """Whether the intervals of the two mean divergences lie apart; without an interval nothing is known."""
    one, other = a.kld, b.kld
    if one is None or other is None or one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.high < other.low or other.high < one.low


def best(rows: Sequence[Row]) -> tuple[Row, Row | None]:
    """The closest of some rows, and the smallest that is smaller and cannot be told from it."""
    first = min(rows, key=lambda row: (_divergence(row), row.bytes))
    alike = [row for row in rows if row.bytes < first.bytes and not distinguishable(row, first)]
    return first, min(alike, key=lambda row: row.bytes, default=None)


def occasions(comparison: Comparison, advice: Advice) -> dict[str, str]:
    """When to take each variant that compares, by name, in a few words; of a single one nothing."""
    rows = sorted(comparison.comparable, key=lambda row: (row.bytes, _divergence(row)))
    if len(rows) < 2:
        return {}
    better = {row.name: [r for r in rows if _beats(r, row)] for row in rows}
    closest, front = best(rows)[0], [row for row in rows if not better[row.name]]
    found = {}
    for row in rows:
        words = ["**recommended**"] if row.name in advice.picks else []
        words += ["closest to the original"] if row is closest else []
        words += ["smallest"] if row is rows[0] else []
        if better[row.name]:
            winner = min(better[row.name], key=_divergence)
            closer = _divergence(winner) < _divergence(row)
            words = [f"rather {winner.name}: {'no larger, and closer' if closer else 'smaller, and as close'}"]
        elif not words:
            larger = front[front.index(row) + 1 :]
            words = [f"where {larger[0].name} does not fit" if larger else f"as good as {closest.name}"]
        found[row.name] = "; ".join(words)
    return found


def _beats(one: Row, other: Row) -> bool:
    """Whether a variant is no larger and no further from the original, and better in one of the two."""
    mine, theirs = (one.bytes, _divergence(one)), (other.bytes, _divergence(other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


# ---------------------------------------------------------------- sentences


def _within(rows: Sequence[Row], memory: int, said: str, dominated: tuple[str, ...]) -> Advice:
    fitting = [row for row in rows if row.bytes <= memory]
    limit = f"Within {said}"
    hint = "an engine takes memory for its context on top of that"
    if not fitting:
        return Advice(f"{limit}: nothing here fits; the smallest is {_facts(rows[0])}.", dominated=dominated)
    first, alike = best(fitting)
    return Advice(f"{limit} of file size ({hint}): {_take(first, alike)}", dominated=dominated, picks=(first.name,))


def _by_size(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    """Closest of all; closest under each fraction of the original that changes the answer; smallest."""
    first, alike = best(rows)
    yield f"Closest to the original: {_take(first, alike, verb='')}"
    base = next((row.bytes for row in comparison.originals if not row.mark), 0)
    told = first
    for fraction, words in STEPS if base else ():
        limit = base / fraction
        fitting = [row for row in rows if row.bytes <= limit]
        if not fitting:
            break
        picked, alike = best(fitting)
        later = next((f for f, _ in STEPS if f > fraction and picked.bytes <= base / f), None)
        if picked is not told and later is None:
            told = picked
            yield f"Under {words} of the original ({human_bytes(limit)}): {_take(picked, alike)}"
    if rows[0] is not told:
        yield f"Smallest: {_facts(rows[0])}."


def _default(rows: Sequence[Row]) -> tuple[Row, str]:
    """What to take without a limit, and why."""
    ratios = [(row, row.scores.perplexity_ratio) for row in rows if row.scores and row.scores.perplexity_ratio]
    for limit in WITHIN:
        kept = [row for row, ratio in ratios if (ratio.high if ratio.high is not None else ratio.value) <= 1 + limit]
        if kept:
            what = f"the smallest whose perplexity, with its interval, is at most {limit:.0%} above the original's"
            return min(kept, key=lambda row: row.bytes), what
    return best(rows)[0], "the closest to the original, though not close"


def _dominated(rows: Sequence[Row]) -> Iterator[str]:
    """Variants that another beats in size and divergence; one line for all that the same one beats."""
    beaten: dict[str, list[Row]] = {}
    by_name = {row.name: row for row in rows}
    for row in rows:
        better = [r for r in rows if r.bytes <= row.bytes and _divergence(r) < _divergence(row)]
        if better and not row.on_front:
            winner = min(better, key=lambda r: (not distinguishable(r, row), _divergence(r)))
            beaten.setdefault(winner.name, []).append(row)
    for name, losers in beaten.items():
        winner = by_name[name]
        for certain in (True, False):
            group = [row for row in losers if distinguishable(row, winner) is certain]
            if not group:
                continue
            names = _listed([f"{row.name} ({_more(row, winner)})" for row in group])
            verb = "is" if len(group) == 1 else "are"
            what = "further from the original" if certain else "no closer to it, as far as the intervals tell"
            other = dict.fromkeys(row.container for row in group if row.container != winner.container)
            unless = f", unless an engine asks for their container ({', '.join(other)})" if other else ""
            yield f"Not worth taking beside {name}: {names} {verb} no smaller, and {what}{unless}."


def _take(row: Row, alike: Row | None, verb: str = "take ") -> str:
    sentence = f"{verb}{_facts(row)}"
    if alike is None:
        return f"{sentence}."
    less = human_bytes(row.bytes - alike.bytes)
    return f"{sentence}; {alike.name} is {less} smaller and not distinguishable in KL ({interval(alike.kld)})."


def _facts(row: Row) -> str:
    return f"{row.name} ({_figures(row)})"


def _figures(row: Row) -> str:
    parts = [human_bytes(row.bytes)]
    if row.share is not None:
        parts[0] += f", {percent(row.share)} of the original"
    parts.append(f"KL {interval(row.kld)}")
    if (speed := row.generation) is not None:
        parts.append(f"{speed.value:.2f} times its tokens/s")
    return ", ".join(parts)


def _more(row: Row, winner: Row) -> str:
    more = row.bytes - winner.bytes
    return f"{f'{human_bytes(more)} more' if more else 'the same size'}, KL {interval(row.kld)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _divergence(row: Row) -> float:
    kld = row.kld
    assert kld is not None
    return kld.value
