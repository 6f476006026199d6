"""What tells of a run beside its scorecard: recipe, tensors, what reproduces it, model cards.

All of it is made in the work folder before there is a scorecard, and put in place behind it: so a kill between the two leaves
what the next run puts there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import plugins
from compress.errors import CalibrationError, CheckpointError
from compress.files import checksum, disk_errors, sync, write_synced
from compress.models.checkpoint import Checkpoint, checksums
from compress.models.companions import is_legal
from compress.plan.plan import Plan
from compress.recipe.schema import Recipe
from compress.report.card import model_cards
from compress.report.reproduction import Original, Started, reproduction
from compress.report.scorecard import RECIPE_FILE, REPRODUCE_FILE, Scorecard
from compress.run.claim import LADDER, TEXT, Undertaking
from compress.streaming.journal import WORK, Journal
from compress.text import hub_sets, text_set

TOLD = "told"  # in the work folder


def started(plan: Plan, undertaking: Undertaking, journal: Journal, checkpoint: Checkpoint) -> Started:
    """What a run started from; reads the original's files, about a second a gigabyte. plan: the first of a ladder's."""
    text = journal.inputs.get(TEXT) if plan.needs_calibration else None
    recipe = dict(undertaking.told)
    ladder = recipe.pop(LADDER, None)
    return Started(
        recipe=recipe if ladder is None else {**recipe, "types": list(ladder)},
        ladder=ladder,
        original=Original.of(plan.identity, checksums(checkpoint)),
        calibration=text,
        datasets=() if text is None else _hub_sets(plan.recipe),
        plugins=plugins.digests(),
    )


def _hub_sets(recipe: Recipe) -> tuple[str, ...]:
    with suppress(CalibrationError):  # a text that was there when it was read
        return hub_sets(text_set(recipe.calibration.source))
    return ()


def told_files(
    card: Scorecard, recipe: Mapping[str, Any], start: Started | None, more: Mapping[str, bytes]
) -> dict[str, bytes]:
    """All that tells of a run, by path from its folder. start: None of one that has not passed its gate, of which there is
    nothing to reproduce and no model card; more: files that are told as they are."""
    files = {RECIPE_FILE: json.dumps(recipe, indent=2).encode(), **more}
    if start is not None:
        made = reproduction(card, start)
        files[REPRODUCE_FILE] = made.to_json().encode()
        files |= {name: text.encode() for name, text in model_cards(card, made).items()}
    return files


def prepare(output: Path, files: Mapping[str, bytes]) -> None:
    """Write what `told_files` gives into the work folder."""
    folder = output / WORK / TOLD
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_synced(folder / name, data)


def put(output: Path) -> None:
    """Give what was prepared its place, as far as that was not done before."""
    folder = output / WORK / TOLD
    with disk_errors(output):
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            target = output / path.relative_to(folder)
            if target.parent.is_dir():
                os.replace(path, target)
                sync(target.parent)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Expected:
    """What a run has to start from that repeats another one: otherwise it ends before anything is solved.

    recipes: as the files of the other one know them, a ladder's by type; calibration: sha256 of the token windows, None where
    none are read.
    """

    recipes: Mapping[str | None, Recipe]
    original: Original
    calibration: str | None = None

    def plan(self, plan: Plan, variant: str | None = None) -> Plan:
        """A plan whose files say what those of the other run say, wherever model and text lie here."""
        return replace(plan, identity=self.original.identity, repeats=self.recipes[variant])

    def require_original(self, checkpoint: Checkpoint) -> list[str]:
        """Raises CheckpointError where a file that decides the bytes is another one. Returns a line for each licence or card
        that is, which changes nothing but its copies."""
        wanted, found = self.original.files, checksums(checkpoint)
        if checkpoint.place.is_file() and sorted(wanted.values()) == sorted(found.values()):
            return []  # a GGUF by another name
        other = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        if deciding := [name for name in other if not is_legal(name)]:
            first = deciding[0]
            what = (
                "is not there" if first not in found else "was not there" if first not in wanted else "is another one"
            )
            more = f" (and {len(deciding) - 1} more)" if len(deciding) > 1 else ""
            raise CheckpointError(
                f"another original: {first} in {checkpoint.folder} {what}{more} than when {self.original.identity.version} was "
                "compressed; give the same one with --model"
            )
        return [f"{name} of the original is another one than it was" for name in other]

    def require_text(self, ids: bytes) -> None:
        """Raises CalibrationError where the calibration windows are others."""
        if self.calibration is not None and (found := checksum(ids)) != self.calibration:
            raise CalibrationError(
                f"another calibration text: the sha256 of its windows was {self.calibration[:12]}..., here it is {found[:12]}...; "
                "give the same text with --set calibration.dataset=..."
            )
