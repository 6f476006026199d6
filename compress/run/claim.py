"""The output folder of a run: whether it can be ours, and whether there is anything left to do in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, OutputError, ResumeError
from compress.files import write_synced
from compress.plan.plan import Plan
from compress.reading import Place, dotted, shown
from compress.recipe.schema import Recipe
from compress.report import scorecard as scorecards
from compress.report.checksums import OK, sentence, statuses
from compress.report.scorecard import Scorecard
from compress.streaming.journal import JOURNAL, WORK, Journal, OtherRun

TEXT = "calibration text"  # as the journal calls the windows that units are made from
PRODUCTS = "precision of products"  # the same of how it computes
MOST_DIFFERENCES = 3
LADDER = "ladder"  # the key of a ladder's recipes, by type
OWN = ("steps", "export")  # what each of them has of its own, beside its name
JUDGED = ("score", "gate")  # may differ: they decide no byte


@dataclass(frozen=True)
class Undertaking:
    """What a run is to its output folder.

    told: the recipe as it is carried out, for a file that ships; recipe_digest: of the recipe's content; digest: of all that its
    units depend on; disk_bytes: what it takes there.
    """

    told: Mapping[str, Any]
    recipe_digest: str
    digest: str
    disk_bytes: int

    @classmethod
    def of(cls, plan: Plan) -> Undertaking:
        """Of a single plan."""
        return cls(recipe_as_told(plan), plan.recipe.digest(), plan.digest, plan.disk_bytes)

    @classmethod
    def of_ladder(cls, name: str, plans: Mapping[str, Plan]) -> Undertaking:
        """Of several plans of one model, by type."""
        lead = next(iter(plans.values()))
        recipes = {kind: recipe_as_told(plan) for kind, plan in plans.items()}
        common = {key: value for key, value in next(iter(recipes.values())).items() if key not in OWN}
        shared = (len(plans) - 1) * 6 * lead.activation_bytes  # one copy of the activations serves all
        return cls(
            {**common, "name": name, LADDER: recipes},
            _combined({kind: plan.recipe.digest() for kind, plan in plans.items()}),
            _combined({kind: plan.digest for kind, plan in plans.items()}),
            sum(plan.disk_bytes for plan in plans.values()) - shared,
        )


def _combined(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def claim(output: Path, ours: Undertaking, *, fresh: bool = False) -> Path:
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
            if finished.recipe_digest != ours.recipe_digest:
                differing = differences(output / scorecards.RECIPE_FILE, ours)
                raise OutputError(
                    f"{output} holds a finished run of another recipe ({finished.recipe}{differing and f': {differing}'}); "
                    "choose another --output, or replace it with --fresh"
                )
    nearest = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"cannot write into {output}: {nearest} is no folder or read-only; choose another --output")
    free = shutil.disk_usage(nearest).free
    if free < ours.disk_bytes and not begun:
        raise OutputError(
            f"{output} has {free / 1e9:.2f} GB free, the run needs {ours.disk_bytes / 1e9:.2f} GB; "
            "free some space or choose another --output"
        )
    return output


def open_journal(output: Path, ours: Undertaking, *, fresh: bool) -> Journal:
    """The journal of a run, begun or to be begun. Raises ResumeError as `Journal.open`; where the recipe is another one, it says
    which settings differ."""
    told = output / WORK / scorecards.RECIPE_FILE
    try:
        journal = Journal.open(output / WORK, ours.digest, fresh=fresh)
    except OtherRun as error:
        if differing := differences(told, ours):
            raise ResumeError(
                f"{output} holds an unfinished run of another recipe: {differing}; "
                "finish that one, choose another --output, or discard it with --fresh"
            ) from None
        raise error from None
    write_recipe(ours, told.parent)
    return journal


def write_recipe(ours: Undertaking, folder: Path) -> None:
    """The recipe as it is carried out, beside what is made of it."""
    write_synced(folder / scorecards.RECIPE_FILE, json.dumps(ours.told, indent=2).encode())


def recipe_as_told(plan: Plan) -> dict[str, Any]:
    """The recipe as it was carried out, for a file that ships: the model by its name, no path of this machine."""
    return plan.told.portable()


def differences(told: Path, ours: Undertaking) -> str:
    """Which settings of the recipe in a file are others than ours, and what they are there and here; "" where all are
    the same or there is no such file."""
    try:
        there, here = _flat(json.loads(told.read_text(encoding="utf-8"))), _flat(dict(ours.told))
    except (OSError, ValueError):
        return ""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key) and not key.startswith(JUDGED)]
    lines = [f"{key} is {_shown(there.get(key))} there, {_shown(here.get(key))} here" for key in keys]
    more = f" and {len(lines) - MOST_DIFFERENCES} more" if len(lines) > MOST_DIFFERENCES else ""
    return ", ".join(lines[:MOST_DIFFERENCES]) + more


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(str(value))


def _flat(value: Any, at: Place = ()) -> dict[str, Any]:
    """Dotted keys and their values."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not inside:
        return {dotted(at): value}
    return {key: found for part, item in inside for key, found in _flat(item, (*at, part)).items()}


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
    found = statuses(card.everything, output)
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
    judged = recipe.model_dump(mode="json", include={"score", "gate"})
    if judged["score"] is not None and judged["score"]["base"] is None:  # as before there was such a key
        del judged["score"]["base"]
    facts = [digest, text, judged]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(output: Path) -> Scorecard:
    try:
        return scorecards.read(output)
    except CompressError as error:
        raise OutputError(f"{str(error).rpartition(';')[0]}; replace it with --fresh") from None
