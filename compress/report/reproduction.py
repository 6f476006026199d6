"""reproduce.json: what a run started from and the checksums of what it made, so that it can be carried out again and compared.

It lies beside the scorecard of a run that passed its gate. Models and texts are known by name and checksum, nothing by where it
lay. Keys are only ever added; `format` rises when that is not enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from compress.errors import CompressError, NoSuchRun
from compress.limits import JSON_BYTES
from compress.models.identity import Identity
from compress.reading import Unreadable, dotted, parse_json, read_text
from compress.report.scorecard import REPRODUCE_FILE, Scorecard, inside
from compress.scoring.results import Value

FORMAT = 1
DECIDING = ("compress", "torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf")
"""Packages on whose versions bytes may depend; others score, or run what was made."""
ENVIRONMENT = ("cpu", "threads", "device", "python", "system")
"""Of a machine: what is compared, beside the versions of packages."""


class Original(Value):
    """The model that was compressed: what its card says, and sha256 of its files by name. Those of the weights, the
    configuration and the tokenizer decide the bytes of what is made; licence and card go along."""

    name: str
    owner: str = ""
    commit: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, identity: Identity, files: Mapping[str, str]) -> Original:
        return cls(**asdict(identity), files=dict(files))

    @property
    def identity(self) -> Identity:
        """Who it is, as files that are made of it say."""
        return Identity(**self.model_dump(exclude={"files"}))


class Reproduction(Value):
    """The whole file.

    recipe: as it was carried out, the model by its identity, no output folder; calibration: sha256 of the token windows, None
    where none were read; datasets: hub ids of the sets that they are from; plugins: sha256 of the files that were loaded;
    versions, machine: as in the scorecard; files: sha256 of every file of every artifact, beside: of what was made beside
    them, by path from this file's folder. ladder: the recipes of a ladder by type; then `recipe` has what they share.
    """

    recipe: dict[str, Any]
    original: Original
    calibration: str | None = None
    datasets: tuple[str, ...] = ()
    suite: str | None = None
    plugins: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str]
    beside: dict[str, str] = Field(default_factory=dict)
    ladder: dict[str, dict[str, Any]] | None = None
    format: int = FORMAT

    @field_validator("files", "beside")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        return inside(files)

    @property
    def everything(self) -> dict[str, str]:
        """sha256 of all that the run made, by path."""
        return {**self.files, **self.beside}

    def to_json(self) -> str:
        """Indented JSON, without what is not there."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Started:
    """What a scorecard does not say of the start of a run; the fields are those of Reproduction."""

    recipe: Mapping[str, Any]
    original: Original
    calibration: str | None = None
    datasets: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    ladder: Mapping[str, Any] | None = None


def reproduction(card: Scorecard, started: Started) -> Reproduction:
    """What reproduce.json says of a run."""
    return Reproduction(
        recipe=dict(started.recipe),
        original=started.original,
        calibration=started.calibration,
        datasets=started.datasets,
        suite=card.suite,
        plugins=started.plugins,
        versions=card.versions,
        machine=card.machine,
        files=card.files,
        beside=card.beside,
        ladder=None if started.ladder is None else dict(started.ladder),
    )


def read(path: str | Path) -> Reproduction:
    """Read a reproduce.json, or the one in a run's folder. Raises CompressError in one line."""
    source = Path(path)
    if source.is_dir():
        source = source / REPRODUCE_FILE
    try:
        raw = parse_json(read_text(source, JSON_BYTES))
    except FileNotFoundError:
        raise NoSuchRun(
            f"there is no {source}; give a folder of a finished run that has one, the file, or a hub id"
        ) from None
    except Unreadable as error:
        raise CompressError(f"{source} {error}; fetch it again") from None
    if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
        raise CompressError(f"{source} has format {raw['format']}, this version reads {FORMAT}; upgrade compress-llm")
    try:
        return Reproduction.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = dotted(first["loc"]) or "the file"
        raise CompressError(
            f"{source} does not say how to reproduce a run: {where}: {first['msg'].lower()}; fetch it again"
        ) from None


def environment_changes(before: Reproduction, here: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """A line for each thing that bytes depend on and that is another one here than it was. here: of `provenance.machine`."""
    was, machine = before.versions, before.machine
    pairs: list[tuple[str, Any, Any]] = [(name, was[name], versions.get(name)) for name in DECIDING if name in was]
    pairs += [(name, machine[name], here.get(name)) for name in ENVIRONMENT if name in machine]
    return [f"{name}: {then} there, {now or 'none'} here" for name, then, now in pairs if then != now]
