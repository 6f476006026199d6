"""`compress reproduce`: a run carried out once more from its reproduce.json, and what comes of it held against the checksums there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import machine, plugins
from compress.errors import CompressError, NoSuchModel, NoSuchRun, NoSuchText, OutputError, RecipeError
from compress.models.identity import hub_id
from compress.models.locate import model_location
from compress.recipe.ladder import Ladder
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe
from compress.report import provenance
from compress.report.progress import Reporter
from compress.report.reproduction import Reproduction, environment_changes, read
from compress.report.scorecard import FILE_NAME, REPRODUCE_FILE, Scorecard
from compress.run.claim import JUDGED
from compress.run.loop import run, run_ladder
from compress.run.told import Expected
from compress.streaming.placement import Placement
from compress.text import text_set

SAME, DIFFERENT, MISSING, UNEXPECTED = "same", "different", "missing", "unexpected"
SECONDS = 10.0  # in which the hub has to answer


@dataclass(frozen=True)
class Here:
    """What the file cannot know. model: where the original lies; settings: `key=value` of the recipe; output: the folder;
    device: as for a run. None: as the file says."""

    model: str | None = None
    settings: Sequence[str] = ()
    output: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Compared:
    """What came of it. folder: where; files: SAME, DIFFERENT, MISSING or UNEXPECTED by path; changes: a line for each thing that
    bytes depend on and that is another one than it was."""

    folder: str
    files: Mapping[str, str]
    changes: tuple[str, ...] = ()

    @property
    def other(self) -> tuple[str, ...]:
        """The files that are not the same."""
        return tuple(name for name, status in self.files.items() if status != SAME)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        same = not self.other
        return {"folder": self.folder, "same": same, "files": dict(self.files), "changes": list(self.changes)}


def reproduce(target: str, here: Here, reporter: Reporter) -> Compared:
    """Carry out what a reproduce.json, the folder with one, or a repository of the hub (`owner/name@revision`) tells of, and
    compare the sha256 of every file. Scores are not computed again: they decide no byte.

    Raises NoSuchRun (no such file), CompressError (it cannot be read, or is of a newer version), CheckpointError and
    CalibrationError before anything is solved where the original or the calibration text are others, OutputError for a folder
    that holds a finished run, and what `run` raises.
    """
    made = read(located(target))
    if made.plugins and not plugins.digests():
        raise RecipeError(f"{target} was made with {len(made.plugins)} plug-in files; name the same with --plugin")
    device = _device(made, here.device)
    with _threads(made.machine.get("threads")):
        changes = tuple(_changes(made, device))
        for line in changes:
            reporter.say(f"note: differs from the first time: {line}")
        card, folder = _again(made, here, device, reporter)
    return Compared(folder, compared(made.everything, card.everything), changes)


def located(target: str) -> Path:
    """The file that a path or a repository stands for; one of the hub is downloaded. Raises NoSuchRun."""
    path = Path(target)
    if path.exists():
        return path / REPRODUCE_FILE if path.is_dir() else path
    name, revision = hub_id(target)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise NoSuchRun(f"there is no {target}; give a reproduce.json, the folder of a run, or a hub id (owner/name)")
    return _downloaded(target, name, revision)


def _downloaded(target: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, REPRODUCE_FILE, revision=revision, etag_timeout=SECONDS))
    except Exception as error:  # the hub client raises many types; all mean that the file cannot be had
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NoSuchRun(
            f"no {REPRODUCE_FILE} of {target}: it is not here, and the hub answered: {line}; check the name, the network and, for a "
            "private repository, that you are logged in (hf auth login)"
        ) from None


def _again(made: Reproduction, here: Here, device: str, reporter: Reporter) -> tuple[Scorecard, str]:
    """The scorecard of what was carried out once more, and its folder."""
    told: dict[str | None, Any] = {None: made.recipe}
    if made.ladder is not None:
        told = dict(made.ladder.items())
    if not told:
        raise CompressError("the file tells of a ladder without types; fetch it again")
    output = here.output or f"out/{made.recipe.get('name')}-reproduced"
    recipes = {kind: recipe_here(made, recipe, here, output) for kind, recipe in told.items()}
    known = {kind: load_recipe(unjudged(recipe), output=output) for kind, recipe in told.items()}
    expected = Expected(known, made.original, made.calibration)
    if made.ladder is None:
        return run(recipes[None], reporter=reporter, device=device, expected=expected), output
    ladder = Ladder(str(made.recipe.get("name")), output, recipes)
    return run_ladder(ladder, reporter=reporter, device=device, expected=expected), output


def recipe_here(made: Reproduction, told: Mapping[str, Any], here: Here, output: str) -> Recipe:
    """A recipe with model and text as they are found on this machine, without scores, into a folder that is new.

    Raises RecipeError, NoSuchModel and NoSuchText where the file knows them by names that mean nothing here, OutputError.
    """
    recipe = load_recipe(unjudged(told), here.settings, model=here.model, output=output)
    if (Path(output) / FILE_NAME).exists():
        raise OutputError(
            f"{output} holds a finished run, which could be compared with itself only; choose another --output"
        )
    if not made.original.owner and not Path(model_location(recipe.model)).exists():
        raise NoSuchModel(
            f"the original is known by its name, {recipe.model}, and checksums only; say where it lies with --model"
        )
    if recipe.adapter is not None and not Path(recipe.adapter).exists():
        raise NoSuchModel(
            f"the adapter is known by its name, {recipe.adapter}, and checksums only; say where it lies with --set adapter=..."
        )
    if made.calibration is not None:
        try:
            text_set(recipe.calibration.source)
        except NoSuchText as error:
            raise NoSuchText(
                f"the calibration text is known by its name, {recipe.calibration.source.label}, and a checksum only; say where it "
                f"lies with --set calibration.dataset=... ({error})"
            ) from None
    return recipe


def unjudged(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without scores and limits: they decide no byte."""
    return {**{key: value for key, value in recipe.items() if key not in JUDGED}, "score": False}


def compared(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """SAME, DIFFERENT, MISSING or UNEXPECTED of every file, by path. wanted, found: sha256."""

    def status(name: str) -> str:
        if name not in found or name not in wanted:
            return MISSING if name in wanted else UNEXPECTED
        return SAME if found[name] == wanted[name] else DIFFERENT

    return {name: status(name) for name in sorted({*wanted, *found})}


def _device(made: Reproduction, wanted: str | None) -> str:
    """Where to compute: as asked for, else where it was computed, as far as this machine has that."""
    if wanted is not None or machine.DEVICE in os.environ:
        return str(Placement.choose(wanted).device)
    try:
        return str(Placement.choose(str(made.machine.get("device", "cpu"))).device)
    except RecipeError:
        return "cpu"


def _changes(made: Reproduction, device: str) -> Iterator[str]:
    """What bytes depend on and is another one here."""
    yield from environment_changes(made, provenance.machine(device), provenance.versions())
    there, here = set(made.plugins), set(plugins.digests())
    if there != here:
        yield f"plug-ins: {len(there - here)} of {len(there)} are others here, {len(here - there)} more are loaded"


@contextmanager
def _threads(wanted: Any) -> Iterator[None]:
    """As many computing threads as the first time, where this machine has the cores."""
    import torch

    before, said = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    if not isinstance(wanted, int) or wanted == machine.threads() or not 0 < wanted <= machine.look().cpu.cores:
        yield
        return
    try:
        torch.set_num_threads(wanted)
        os.environ["OMP_NUM_THREADS"] = str(wanted)  # by which the scorecard tells them, and engines start theirs
        yield
    finally:
        torch.set_num_threads(before)
        if said is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = said
