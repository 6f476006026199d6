"""The output folder of a run: whether it can be ours, and whether there is anything left to do in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from compress.errors import CompressError, OutputError
from compress.plan.plan import Plan
from compress.recipe.schema import Recipe
from compress.report import scorecard as scorecards
from compress.report.checksums import OK, sentence, statuses
from compress.report.scorecard import Scorecard
from compress.streaming.journal import JOURNAL, WORK

TEXT = "calibration text"  # as the journal calls the windows that units are made from


def claim(output: Path, plan: Plan, *, fresh: bool = False) -> Path:
    """The output folder, if it can be ours: new, empty, or of this very recipe. Raises OutputError otherwise or on a
    full disk; touches nothing. Whose an unfinished run is, its journal says.

    fresh: the folder of another recipe's finished run will do, too.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; choose another --output")
    begun = (output / WORK / JOURNAL).exists()
    if output.is_dir():
        names = {p.name for p in output.iterdir()}
        if names and not names & {WORK, scorecards.FILE_NAME}:
            raise OutputError(f"{output} holds something else ({sorted(names)[0]}); choose another --output")
        if scorecards.FILE_NAME in names and not fresh and not begun:
            finished = _read(output)
            if finished.recipe_digest != plan.recipe.digest():
                raise OutputError(
                    f"{output} holds a finished run of another recipe ({finished.recipe}); "
                    "choose another --output, or replace it with --fresh"
                )
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"cannot write into {output}: {nearest} is no folder or read-only; choose another --output")
    free = shutil.disk_usage(nearest).free
    if free < plan.disk_bytes and not begun:
        raise OutputError(
            f"{output} has {free / 1e9:.2f} GB free, the run needs {plan.disk_bytes / 1e9:.2f} GB; "
            "free some space or choose another --output"
        )
    return output


def finished(output: Path, digest: Callable[[], str]) -> Scorecard | None:
    """The scorecard of a run of this digest (`run_digest`, asked for only if there is one) that has passed its gate and
    whose artifacts are as they were delivered; None where there is work to do.

    Raises OutputError where an artifact has changed or is missing and nothing is left to make it from.
    """
    if not (output / scorecards.FILE_NAME).exists():
        return None
    card = _read(output)
    if not card.gate.passed or card.run_digest is None or card.run_digest != digest():
        return None
    found = statuses(card.files, output)
    bad = [name for name, status in found.items() if status != OK]
    if bad and (output / WORK / JOURNAL).exists():
        return None
    if bad:
        raise OutputError(
            f"{sentence(output / bad[0], found[bad[0]])}; make it anew with --fresh, or choose another --output"
        )
    return card


def run_digest(digest: str, text: str | None, recipe: Recipe) -> str:
    """sha256 of all that a run depends on: what decides its bytes, then what it is scored with and held against.

    digest: the plan's; text: sha256 of the calibration windows, where some are read.
    """
    facts = [digest, text, recipe.model_dump(mode="json", include={"score", "gate"})]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(output: Path) -> Scorecard:
    try:
        return scorecards.read(output)
    except CompressError as error:
        raise OutputError(f"{str(error).rpartition(';')[0]}; replace it with --fresh") from None
