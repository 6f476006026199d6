"""scorecard.json: what a run made, what it cost, and what it did to the model.

The file's minimum is fixed so that scripts can rely on it: "model", "recipe", "artifacts" (each "container",
"path", "bytes", "bits_per_weight", "scores": {"perplexity", "kld", "top1_agreement"}), "base" ("bytes",
"scores"), "experts", "fallbacks", "gate" ("passed"), "stages" ("name", "seconds", "peak_bytes"). Keys are
only ever added; `format` rises when that is not enough. What was not measured is null or absent, never 0; a
number that is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError, field_validator

from compress.errors import CompressError
from compress.files import write_synced
from compress.report.numbers import pattern, spanned
from compress.scoring.divergence import Scores
from compress.scoring.results import Fallback, Speed, TaskScore, Value

FORMAT = 1
FILE_NAME = "scorecard.json"
RECIPE_FILE = "recipe.json"  # beside it: the recipe as it was carried out
TENSORS_FILE = "tensors.jsonl"  # beside it: a line a tensor, see run/records.py
CARD_FILE = "README.md"  # beside it, and in every artifact that is a folder: the model card, see report/card.py
REPRODUCE_FILE = "reproduce.json"  # beside it: what the run started from, see report/reproduction.py
OWN_FILES = (FILE_NAME, RECIPE_FILE, TENSORS_FILE, CARD_FILE, REPRODUCE_FILE)
"""What a run says of itself."""


def inside(files: dict[str, str]) -> dict[str, str]:
    """Checksums by path, each of which is in the folder that they count from. Raises ValueError."""
    for name in files:
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is not in the scorecard's folder")
    return files


class Artifact(Value):
    """One delivered file set.

    path is relative to the scorecard; bytes: of all files that are needed to run it; bits_per_weight: 8 times the bytes of
    its weight files (scales, zero points, padding, names: everything stored) over the weights of the original; `ratio`: the
    share of the original, `bytes` over the bytes of all files that are needed to run the original. scores: on the suite's first text;
    texts: on every one of them, by name; speed: where it was asked for. `scores.engine` says which engine gave the logits. files: sha256 (hex) of every file
    that is shipped, by its path relative to the scorecard; sha256: that of the only file, or of several the sha256 of the
    lines `<sha256>  <path>` that `sha256sum` prints of them, sorted by path. Cards of models that were only scored, and
    of versions before there were checksums, have neither.
    """

    container: str
    path: str
    bytes: int
    bits_per_weight: float
    variant: str | None = None
    """What tells it from the others of one container, as the type of each file of a ladder; None where there is one."""
    ratio: float | None = None
    sha256: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    delivered: bool = True
    scores: Scores | None = None
    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    texts: dict[str, Scores] = Field(default_factory=dict)
    speed: Speed | None = None

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        return inside(files)

    @property
    def is_folder(self) -> bool:
        """Whether its files lie in a folder, which its path names."""
        return bool(self.files) and self.path not in self.files


class Base(Value):
    """The original: bytes of all files that are needed to run it, of its weight files alone (absent in cards of versions
    whose `bytes` were those), its own scores on the same windows and documents, its own speed beside the artifacts'; all None
    when a model was scored on its own. model: its name, where it is not the one that was compressed."""

    bytes: int | None
    model: str | None = None
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    parameters: int | None = None
    scores: Scores | None = None
    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    texts: dict[str, Scores] = Field(default_factory=dict)
    speed: Speed | None = None


def share_of(artifact: Artifact, base: Base) -> float | None:
    """Bytes of all files of an artifact over those of the original; None where there is no original."""
    return artifact.bytes / base.bytes if base.bytes else artifact.ratio


class LayerError(Value):
    """How far the outputs of all tensors of one layer and role are from those of the target they were solved for.

    layer: None outside the layers (embeddings, head); codec: what most of their weights are stored in. error: squared
    error over squared output, both summed over the tensors and the calibration tokens that reached them (what solvers
    minimise); 0 is exact. parameters: weights in them; variant: of the artifact that they are in, where there are several.
    """

    layer: int | None
    role: str
    codec: str
    error: float
    parameters: int
    variant: str | None = None


class Experts(Value):
    """Routing of one layer during calibration.

    tokens[e]: tokens routed to expert e; cold: experts that saw too few to stand alone; borrowed[e]: share of
    expert e's statistics taken from the layer's pooled statistics, 0..1 (empty: none was borrowed).
    """

    layer: int
    tokens: tuple[int, ...]
    cold: tuple[int, ...] = ()
    borrowed: tuple[float, ...] = ()


class Check(Value):
    """One integrity check and, in `detail`, what was measured against which limit."""

    name: str
    passed: bool
    detail: str = ""


class Gate(Value):
    passed: bool
    checks: tuple[Check, ...] = ()


class Stage(Value):
    """Wall time in seconds and peak resident memory in bytes up to the stage's end."""

    name: str
    seconds: float
    peak_bytes: int | None = None


class Scorecard(Value):
    """The whole file. recipe is the recipe's name, recipe_digest identifies its content after overrides; run_digest also
    the model, the texts, the version, the suite and the limits: a run with the same has nothing left to do."""

    model: str
    recipe: str
    artifacts: tuple[Artifact, ...] = ()
    base: Base
    experts: tuple[Experts, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    gate: Gate
    stages: tuple[Stage, ...] = ()
    recipe_digest: str | None = None
    run_digest: str | None = None
    created: str | None = None
    calibration: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    """Where the bytes were made: sums of floats depend on their order, so the same recipe gives the same bytes on the same kind of
    processor or device, with as many threads and the same versions."""
    notes: tuple[str, ...] = ()
    beside: dict[str, str] = Field(default_factory=dict)
    """sha256 of what was made beside the artifacts, as an importance matrix, by its path relative to the scorecard."""
    format: int = FORMAT
    errors: tuple[LayerError, ...] = ()
    suite: str | None = None
    loader: str = "AutoModelForCausalLM"
    """transformers' class that opens folders of it."""

    @field_validator("beside")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        return inside(files)

    @property
    def cards(self) -> tuple[str, ...]:
        """Where its model cards lie: beside it, and in every artifact that is a folder, unless it brought one of its own."""
        inside = [PurePosixPath(artifact.path, CARD_FILE) for artifact in self.artifacts if artifact.is_folder]
        return tuple(dict.fromkeys((CARD_FILE, *(str(path) for path in inside if str(path) not in self.files))))

    @property
    def told(self) -> tuple[str, ...]:
        """All that tells of the run in its folder, by path: files without checksums here."""
        return tuple(dict.fromkeys((*OWN_FILES, *self.cards)))

    @property
    def files(self) -> dict[str, str]:
        """sha256 of every file of every artifact, by its path relative to the scorecard."""
        return {name: found for artifact in self.artifacts for name, found in artifact.files.items()}

    @property
    def everything(self) -> dict[str, str]:
        """The same with what was made beside the artifacts."""
        return {**self.files, **self.beside}

    @property
    def fallback_kinds(self) -> list[tuple[Fallback, int]]:
        """Fallbacks of one role and cause as one, with how many there are; numbers in them span all (0% to 100%), and the
        subject is the role, or the first one. A row length that does not divide befalls every layer alike."""
        kinds: dict[tuple[str, ...], list[Fallback]] = {}
        for fallback in self.fallbacks:
            told = (fallback.wanted, fallback.used, fallback.reason)
            key = (fallback.role, *map(pattern, told))
            kinds.setdefault(key, []).append(fallback)
        return [(_as_one(alike), len(alike)) for alike in kinds.values()]

    def to_json(self) -> str:
        """Indented JSON; absent scores are left out, numbers that are not finite become null."""
        return json.dumps(_plain(self.model_dump(mode="python")), indent=2, allow_nan=False) + "\n"


def _as_one(alike: Sequence[Fallback]) -> Fallback:
    """What stands for fallbacks that differ in numbers only."""
    first = alike[0]
    if len(alike) == 1:
        return first
    told = {key: spanned([getattr(one, key) for one in alike]) for key in ("wanted", "used", "reason", "cure")}
    return first.model_copy(update={**told, "subject": first.role or first.subject})


def write(scorecard: Scorecard, path: str | Path) -> Path:
    """Write atomically (temporary name, fsync, rename) to a file, or into an existing folder as
    scorecard.json.

    Raises OutputError when the disk refuses.
    """
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    write_synced(target, scorecard.to_json().encode())
    return target


def write_each(scorecards: Sequence[Scorecard], folder: str | Path) -> list[Path]:
    """Write every scorecard into a folder, as a file called after what it is of; two of one name get numbers."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for card in scorecards:
        stem = Path(card.recipe).stem or "scorecard"
        number = sum(path.stem.rpartition("~")[0] == stem or path.stem == stem for path in paths)
        paths.append(write(card, Path(folder) / (f"{stem}~{number + 1}.json" if number else f"{stem}.json")))
    return paths


def read(path: str | Path) -> Scorecard:
    """Read a scorecard.json, or the one in a run's folder. Raises CompressError in one line."""
    source = Path(path)
    if source.is_dir():
        source = source / FILE_NAME
    try:
        raw = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressError(f"no scorecard at {source}; give a finished run's folder or its {FILE_NAME}") from None
    except OSError as error:
        raise CompressError(f"cannot read {source}: {error.strerror}; check the path and its permissions") from error
    except ValueError as error:
        raise CompressError(f"{source} is not valid JSON ({error}); run or score the model again") from error
    if not isinstance(raw, dict):
        raise CompressError(f"{source} is not a scorecard: it holds no JSON object; give a run's {FILE_NAME}")
    if isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
        raise CompressError(f"{source} has format {raw['format']}, this version reads {FORMAT}; upgrade compress-llm")
    try:
        return Scorecard.model_validate(_revive(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise CompressError(
            f"{source} is not a scorecard: {where}: {first['msg'].lower()}{more}; score again"
        ) from error


# Estimates that overflow (perplexity of a destroyed model) are null in JSON, which has no infinity.
_ESTIMATES = {
    **{f"{base}{unit}perplexity": ("value",) for base in ("", "base_") for unit in ("", "word_", "byte_")},
    "perplexity_ratio": ("value",),
}


def _plain(value: Any) -> Any:
    """JSON-ready: tuples to lists, None fields of scores dropped, numbers that are not finite to None."""
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items()}
        if "text_digest" in kept:  # the scores of one engine: what was not measured is absent
            kept = {key: item for key, item in kept.items() if item is not None}
        return kept
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _revive(value: Any) -> Any:
    """Undo `_plain` where a required estimate was infinite."""
    if isinstance(value, list):
        return [_revive(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {key: _revive(item) for key, item in value.items()}
    for name, fields in _ESTIMATES.items():
        if isinstance(out.get(name), dict) and "text_digest" in out:
            out[name] = {**out[name], **{f: math.inf for f in fields if out[name].get(f, 0.0) is None}}
    return out
