"""A comparison for programs: nested JSON, and the same flat in CSV. Units are part of the names; what was not measured is
null, an empty field in CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from compress.report.advice import Advice
from compress.report.compare import Comparison, Row
from compress.scoring.divergence import Scores
from compress.scoring.intervals import Interval
from compress.scoring.results import Speed, Spread, TaskScore

FORMAT = 1


def as_dict(comparison: Comparison, advice: Advice) -> dict[str, Any]:
    """{"format", "model", "rows", "warnings", "advice"}; see `row_dict`."""
    return {
        "format": FORMAT,
        "model": comparison.model,
        "rows": [row_dict(row) for row in comparison.rows],
        "warnings": list(comparison.warnings),
        "advice": asdict(advice),
    }


def to_json(comparison: Comparison, advice: Advice) -> str:
    """Indented, ending with a newline."""
    return json.dumps(as_dict(comparison, advice), indent=2, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line a row; a column for every number of `row_dict` that any row has, path joined by underscores."""
    names, rows = flat_rows(comparison)
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: int(v) if isinstance(v, bool) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def flat_rows(comparison: Comparison) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns in their order, and what every row has of them."""
    rows = [dict(_flat(row_dict(row))) for row in comparison.rows]
    return sorted({name for row in rows for name in row}, key=_order(rows)), rows


def row_dict(row: Row) -> dict[str, Any]:
    """Everything a row holds. comparable: false where a warning says that its figures belong to another original or text."""
    return {
        "name": row.name,
        "original": row.original,
        "comparable": not row.mark,
        "failed": row.failed,
        "on_front": row.on_front,
        "container": row.container or None,
        "bytes": row.bytes,
        "share": _number(row.share),
        "bits_per_weight": _number(row.bits_per_weight),
        **_scores(row.scores),
        "texts": {name: _scores(scores) for name, scores in row.texts.items()},
        "tasks": {name: _task(score) for name, score in row.tasks.items()},
        "speed": None if row.speed is None else _speed(row.speed),
    }


def _scores(scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {"perplexity": None}
    kld = scores.kld
    return {
        "text": scores.text or None,
        "text_digest": scores.text_digest,
        "protocol": scores.protocol,
        "engine": scores.engine,
        "tokens": scores.tokens,
        "documents": scores.documents,
        "kl_nats": None if kld is None else {key: _number(value) for key, value in asdict(kld).items()},
        "perplexity": _interval(scores.perplexity),
        "word_perplexity": _interval(scores.word_perplexity),
        "byte_perplexity": _interval(scores.byte_perplexity),
        "perplexity_ratio": _interval(scores.perplexity_ratio),
        "top1_agreement": _interval(scores.top1_agreement),
    }


def _task(score: TaskScore) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "documents": score.n,
        **{key: _number(getattr(score, key)) for key in ("value", "low", "high")},
        "change": _interval(score.change),
        "lost": None if score.flips is None else _interval(score.flips.lost),
        "gained": None if score.flips is None else _interval(score.flips.gained),
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "engine": speed.engine,
        "threads": speed.threads,
        "prompt_tokens": speed.prompt_tokens,
        "generated_tokens": speed.generated_tokens,
        "repetitions": speed.repetitions,
        "prompt_tokens_per_second": _spread(speed.prompt),
        "generation_tokens_per_second": _spread(speed.generation),
        "first_token_seconds": _spread(speed.first_token),
        "load_seconds": _spread(speed.load),
        "peak_bytes": speed.peak_bytes,
        "ratio": {name: _spread(ratio) for name, ratio in speed.ratio.items()},
    }


def _interval(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {key: _number(getattr(found, key)) for key in ("value", "low", "high")}


def _spread(found: Spread) -> dict[str, float | None]:
    return {key: _number(getattr(found, key)) for key in ("median", "low", "high")}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{path}{key}_")
        elif item is not None:
            yield f"{path}{key}", item


def _order(rows: list[dict[str, Any]]) -> Any:
    """Columns in the order of the row that has most of them."""
    most = max(map(len, rows))
    fullest = next(row for row in rows if len(row) == most)
    place = {name: number for number, name in enumerate(fullest)}
    return lambda name: (place.get(name, len(place)), name)
