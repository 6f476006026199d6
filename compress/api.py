"""The library's front door: what the command line does, for Python; `compress` has these names. docs/python.md shows them.

All say how far they are: in a terminal with bars, in a notebook with a line, in logs with lines; quiet=True says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from compress.errors import CompressError
from compress.recipe.load import RecipeLike, load_recipe, plain

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe
    from compress.report.compare import Run
    from compress.report.result import Compared, Result, ShownPlan
    from compress.report.scorecard import Scorecard

Place = str | Path
Changes = Mapping[str, Any] | Sequence[str] | str
"""Values of a recipe by their keys, or the last parts of these: {"scheme": "Q5_K_M", "samples": 64}, or ["samples=64"]."""


def run(
    recipe: RecipeLike,
    *,
    model: Place | None = None,
    output: Place | None = None,
    set: Changes | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Result:
    """Carry out a recipe: calibrate, quantize, export, check, score.

    recipe: a recipe file, a bundled recipe or a type by name ("Q4_K_M", "W4A16", "gptq"), a dict as a recipe's file has it, or a
    `Recipe`. model, output, set: instead of the recipe's. fresh: start over, whatever the output folder holds. device: auto, cpu,
    cuda, cuda:N or mps; by default what COMPRESS_DEVICE says, else the CPU.

    One that was killed continues where it stopped, one that is finished is not done again. Raises GateFailed when an artifact is
    not fit to deliver, and the other CompressErrors before anything has its final name.
    """
    from compress.report.notebook import reporting
    from compress.report.result import Result

    loaded = _loaded(recipe, model, output, set)
    with reporting(f"run {loaded.name}", quiet) as reporter:
        with reporter.stage("start", told=False):  # torch takes seconds to import
            from compress.run.loop import run as carry_out
        card = carry_out(loaded, fresh=fresh, reporter=reporter, device=device)
    return Result(card, Path(loaded.output))


def ladder(
    model: Place,
    types: Sequence[str] | None = None,
    *,
    output: Place | None = None,
    set: Changes | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Result:
    """Several types of one model from one calibration, as `compress ladder`: one result with an artifact a type.

    types: as ["Q8_0", "Q4_K_M"], by default eight from Q8_0 to IQ2_M. The other arguments, and errors, as of `run`.
    """
    from compress.recipe.ladder import USUAL, load_ladder
    from compress.report.notebook import reporting
    from compress.report.result import Result

    folder = None if output is None else str(output)
    loaded = load_ladder(types or USUAL, _changes(set), model=str(model), output=folder)
    with reporting(f"ladder {loaded.name}", quiet) as reporter:
        with reporter.stage("start", told=False):
            from compress.run.loop import run_ladder
        card = run_ladder(loaded, fresh=fresh, reporter=reporter, device=device)
    return Result(card, Path(loaded.output))


def plan(
    recipe: RecipeLike, *, model: Place | None = None, output: Place | None = None, set: Changes | None = None
) -> ShownPlan:
    """Prove a recipe legal for its model and read its texts; takes what `run` does. Reads no weights.

    Raises PlanError with all problems, UnsupportedModel, CheckpointError or CalibrationError.
    """
    from compress.plan.make import make_plan
    from compress.plan.texts import read_texts
    from compress.report.result import ShownPlan

    made = make_plan(_loaded(recipe, model, output, set))
    return ShownPlan.of(replace(made, warnings=(*made.warnings, *read_texts(made))))


@overload
def score(  # type: ignore[overload-overlap]  # a text is a sequence, too
    targets: Place | Result,
    against: Place | None = None,
    *,
    suite: Place = "quick",
    speed: bool = False,
    device: str | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> Result: ...
@overload
def score(
    targets: Sequence[Place | Result],
    against: Place | None = None,
    *,
    suite: Place = "quick",
    speed: bool = False,
    device: str | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> list[Result]: ...
def score(
    targets: Place | Result | Sequence[Place | Result],
    against: Place | None = None,
    *,
    suite: Place = "quick",
    speed: bool = False,
    device: str | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> Result | list[Result]:
    """Perplexity, KL divergence and task accuracy of a model, or of several, against the original where that is named.

    targets: one or a list of GGUF files (of a split set the first), folders of any container or of a run, hub ids, bundled models
    and results of `run`. against: the original; without it, perplexity and task accuracy only. suite: quick, standard, full,
    safety, or a file. speed: time their engines, too. strict: what speaks against the original fails the gate.

    Returns a result for a target, a list of them for a list; of a run with several artifacts all are in one. Of several targets one
    that cannot be scored has a result without scores, whose gate says why; a single one raises. Raises CheckpointError,
    UnsupportedModel, CalibrationError and NumericalError.
    """
    from compress.report.notebook import reporting

    one = isinstance(targets, str | Path) or not isinstance(targets, Sequence)
    asked = [_names(target) for target in cast(Any, [targets] if one else targets)]
    names = list(dict.fromkeys(name for group in asked for name in group))
    with reporting(
        f"score {len(names)} models" if len(names) > 1 else f"score {Path(names[0]).name}", quiet
    ) as reporter:
        with reporter.stage("start", told=False):
            from compress.run.score import Settings, score_targets
        settings = Settings(str(suite), device, strict=strict, speed=speed)
        cards = score_targets(names, None if against is None else str(against), settings, reporter)
    found = dict(zip(names, cards, strict=True))
    results = [_as_one([found[name] for name in group]) for group in asked]
    return results[0] if one else results


def compare(
    *runs: Place | Result | Scorecard | Sequence[Any] | Mapping[str, Any], memory: str | None = None
) -> Compared:
    """Variants side by side, and which of them to take.

    runs: results of `run` and `score`, scorecards, folders of runs, scorecard files, folders of either; a list of these, or a dict
    that gives each a label. memory: what the model may take, as "4GB".

    Raises NoSuchRun and CompressError for what is no run, or cannot be read.
    """
    from compress.recipe.schema import byte_count
    from compress.report.result import Compared

    limit = None if memory is None else byte_count(memory)
    if memory is not None and not limit:
        raise CompressError(f"expected a size like 4GB or 512MiB, got {memory}")
    skipped: list[str] = []
    found = [run for item in runs for run in _runs(item, skipped)]
    if not found:
        raise CompressError("nothing to compare; give results, scorecards or folders of runs")
    return Compared.of(found, memory=limit, said=(memory or "").strip(), skipped=skipped)


def _loaded(recipe: RecipeLike, model: Place | None, output: Place | None, changes: Changes | None) -> Recipe:
    place, folder = (None if given is None else str(given) for given in (model, output))
    return load_recipe(recipe, _changes(changes), model=place, output=folder)


def _changes(given: Changes | None) -> Sequence[str]:
    """As the command line has them."""
    if isinstance(given, Mapping):
        return [f"{key}={json.dumps(plain(value))}" for key, value in given.items()]
    return [given] if isinstance(given, str) else given or ()


def _names(target: Place | Result) -> list[str]:
    """What a target stands for, as the command line takes it."""
    from compress.report.result import Result
    from compress.run.targets import expanded

    names = [str(path) for path in target.paths] if isinstance(target, Result) else [str(target)]
    return list(expanded(names))


def _as_one(cards: Sequence[Scorecard]) -> Result:
    """Of all artifacts of one target."""
    from compress.report.result import Result
    from compress.report.scorecard import Gate

    first = cards[0]
    if len(cards) == 1:
        return Result(first)
    update = {
        "artifacts": tuple(artifact for card in cards for artifact in card.artifacts),
        "fallbacks": tuple(line for card in cards for line in card.fallbacks),
        "notes": tuple(dict.fromkeys(note for card in cards for note in card.notes)),
        "stages": tuple(stage for card in cards for stage in card.stages),
        "gate": Gate(
            passed=all(card.gate.passed for card in cards), checks=tuple(c for card in cards for c in card.gate.checks)
        ),
    }
    return Result(first.model_copy(update=update))


def _runs(item: Any, skipped: list[str], label: str = "") -> Iterator[Run]:
    """What a thing stands for in a comparison; skipped gets lines about what is no finished run."""
    from compress.report.compare import Run
    from compress.report.result import Result
    from compress.report.runs import find_runs
    from compress.report.scorecard import Scorecard

    if isinstance(item, Result):
        yield item.run(label)
    elif isinstance(item, Scorecard):
        yield Run(item, label)
    elif isinstance(item, Mapping):
        for name, inner in item.items():
            yield from _runs(inner, skipped, str(name))
    elif isinstance(item, str | Path):
        found, lines = find_runs([str(item)])
        skipped += lines
        if label and len(found) > 1:
            raise CompressError(f"{item} holds {len(found)} runs and the label {label} names one; name each")
        yield from (replace(run, label=label or run.label) for run in found)
    elif isinstance(item, Sequence):
        for inner in item:
            yield from _runs(inner, skipped, label)
    else:
        raise CompressError(f"cannot compare a {type(item).__name__}; give results, scorecards or folders of runs")
