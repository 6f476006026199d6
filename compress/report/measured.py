"""With what the figures of a comparison were measured, and lines of a scorecard for pages that travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from compress.reading import shown
from compress.report.compare import Comparison, model_name, text_facts, without_paths
from compress.report.scorecard import Scorecard


def measured(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What the figures were measured with: term and what it was."""
    rows = [row for row in comparison.variants if not row.mark]
    scored = [row.scores for row in rows if row.scores is not None]
    if suites := dict.fromkeys(shown(row.card.suite) for row in rows if row.card.suite):
        yield "suite", ", ".join(suites)
    if scored:
        first = scored[0]
        yield "text", text_facts(first)
        units = f", {first.documents} documents are the independent units of the intervals" if first.documents else ""
        yield "scored", f"{first.tokens:,} predicted tokens, stride {first.stride}, protocol {first.protocol}{units}"
        yield "tokenizer", model_name(first.tokenizer)
        engines: dict[str, list[str]] = {}
        for row in rows:
            if row.scores is not None:
                engines.setdefault(shown(row.scores.engine), []).append(row.name)
        told = (
            [f"{engine} ({', '.join(names)})" for engine, names in engines.items()]
            if len(engines) > 1
            else list(engines)
        )
        yield ("engines" if len(engines) > 1 else "engine"), "; ".join(told)
    speeds = [row.speed for row in rows if row.speed is not None]
    if speeds:
        first_speed = speeds[0]
        yield (
            "speed",
            (
                f"{first_speed.prompt_tokens} prompt and {first_speed.generated_tokens} generated tokens, "
                f"{first_speed.threads} threads, {first_speed.repetitions} repetitions in turns with the original"
            ),
        )


def cleaner(card: Scorecard) -> Callable[[str], str]:
    """A function that takes paths of this machine out of what a scorecard says, each line on one."""
    paths = (card.model, *(artifact.path for artifact in card.artifacts))
    return lambda text: shown(without_paths(text, *paths), 400)
