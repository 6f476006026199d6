"""From what people name on the command line to the scorecards behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError, NoSuchRun
from compress.report import scorecard as scorecards
from compress.report.compare import Run
from compress.streaming.journal import WORK


@dataclass(frozen=True)
class _Named:
    """A folder or scorecard, and the label it was given."""

    path: Path
    label: str = ""


def find_runs(arguments: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs, each once, and a line for every folder without a finished one.

    An argument is a run's folder, its scorecard.json, or a folder of runs or scorecards; `LABEL=` before it names the run's rows. Raises
    CompressError for what is not there, for scorecards that cannot be read, and where no run is left.
    """
    runs: dict[Path, Run] = {}
    skipped: list[str] = []
    for named in (found for argument in arguments for found in _expanded(argument)):
        card = named.path / scorecards.FILE_NAME if named.path.is_dir() else named.path
        if not card.exists():
            what = "an unfinished run" if (named.path / WORK).is_dir() else f"no {scorecards.FILE_NAME}"
            skipped.append(f"{named.path} holds {what}")
            continue
        folder = card.resolve().parent.name if named.path.is_dir() or card.name == scorecards.FILE_NAME else card.stem
        runs.setdefault(card.resolve(), Run(scorecards.read(card), named.label, folder))
    if runs:
        return list(runs.values()), skipped
    if len(skipped) == 1:
        raise CompressError(f"{skipped[0]}; give a finished run's folder or its {scorecards.FILE_NAME}")
    raise CompressError(f"none of {len(skipped)} folders holds a finished run; the first: {skipped[0]}")


def _expanded(argument: str) -> Iterator[_Named]:
    """The runs that an argument stands for."""
    label, path = _split(argument)
    if not path.exists():
        raise NoSuchRun(f"no run at {path}; give a finished run's folder or its {scorecards.FILE_NAME}")
    inside = [] if not path.is_dir() or (path / scorecards.FILE_NAME).exists() else _runs_in(path)
    if not inside:
        yield _Named(path, label)
        return
    if label and len(inside) > 1:
        raise CompressError(f"{path} holds {len(inside)} runs and a label names one; name each: {label}={inside[0]}")
    yield from (_Named(folder, label) for folder in inside)


def _split(argument: str) -> tuple[str, Path]:
    """`LABEL=path`; a path that holds an equals sign stands for itself where it exists."""
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return "", Path(argument)
    if not label.strip() or not path:
        raise CompressError(f"expected LABEL=RUN, got {argument}; give a name and a run's folder")
    return label.strip(), Path(path)


def _runs_in(folder: Path) -> list[Path]:
    """Runs in a folder, finished or begun, and scorecards by whatever name; none unless one is finished."""
    inside = sorted(folder.iterdir())
    folders = [path for path in inside if path.is_dir()]
    finished = [path for path in folders if (path / scorecards.FILE_NAME).exists()]
    finished += [path for path in inside if path.suffix == ".json" and path.is_file() and _is_card(path)]
    begun = [path for path in folders if path not in finished and (path / WORK).is_dir()]
    return sorted(finished + begun) if finished else []


def _is_card(path: Path) -> bool:
    """Whether a JSON file looks like a scorecard."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and {"model", "recipe", "artifacts", "gate"} <= raw.keys()
