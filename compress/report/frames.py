"""Results as pandas DataFrames: a row a variant, a layer and role, an expert, or a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError, MissingExtra
from compress.report.compare import Comparison
from compress.report.compare_data import flat_rows
from compress.report.scorecard import TENSORS_FILE, Scorecard


def variants_frame(comparison: Comparison) -> Any:
    """A row a variant, originals among them, by its name; a column a number, as in `compress compare --csv`."""
    names, rows = flat_rows(comparison)
    return _frame(rows, names).set_index("name")


def errors_frame(card: Scorecard) -> Any:
    """Columns layer (missing outside the layers), role, codec, error (squared error over squared output on the calibration text),
    parameters; of a ladder variant in front, its type."""
    first = ("variant",) if any(error.variant is not None for error in card.errors) else ()
    names = (*first, "layer", "role", "codec", "error", "parameters")
    return _of_layers([error.model_dump() for error in card.errors], names)


def experts_frame(card: Scorecard) -> Any:
    """Columns layer, expert, tokens (that calibration routed to it), cold (whether those were too few), borrowed (share of its
    statistics that is the layer's)."""

    def rows() -> Iterator[dict[str, Any]]:
        for layer in card.experts:
            for expert, tokens in enumerate(layer.tokens):
                borrowed = layer.borrowed[expert] if layer.borrowed else 0.0
                cold = expert in layer.cold
                yield {"layer": layer.layer, "expert": expert, "tokens": tokens, "cold": cold, "borrowed": borrowed}

    return _frame(rows(), ("layer", "expert", "tokens", "cold", "borrowed"))


def tensors_frame(folder: Path | None) -> Any:
    """A row a tensor of a run's folder, as docs/comparing.md describes tensors.jsonl. Raises CompressError where there is no such
    file."""
    path = None if folder is None else folder / TENSORS_FILE
    if path is None or not path.is_file():
        raise CompressError(
            f"no {TENSORS_FILE} {'here' if path is None else f'in {folder}'}: it lies in the folder of a run"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = tuple(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    return _of_layers(rows, names)


def _of_layers(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Numbers of layers and experts stay whole where some are missing."""
    found = _frame(rows, names)
    return found.astype({name: "Int64" for name in ("layer", "expert") if name in names})


def _frame(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra("pandas", "notebooks", "to_pandas()") from error
    return pandas.DataFrame(list(rows), columns=list(names))
