"""Text in: finds calibration and evaluation sets, reads their documents, packs them into token windows.

A set is a YAML file in `calibration/` or `eval/`, found by name, or any file of the user's own, by path:

    name: mixed                 # required
    description: ...            # required; also licence and attribution
    files: [text.jsonl.xz]      # beside the YAML: .txt, .jsonl, either with .xz
    hub: {path: owner/set, name: config, split: train, column: text}     # or, instead of files, a hub set
    mix: {wikipedia: 4, novels: 1}       # or other sets, by weight
    format: text | wikitext | jsonl      # of the files, when the suffix does not tell
    column: text                         # the field of a JSON line that holds the document

Lengths are in tokens of the given tokenizer. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from compress.errors import CalibrationError

DataKind = Literal["recipes", "calibration", "eval", "models"]
TEXT_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")
HUB_KEYS = {"path", "name", "split", "column"}


# ---------------------------------------------------------------------------------- finding the data


def data_root(kind: DataKind) -> Path:
    """The folder of shipped data: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_data" / kind
    return installed if installed.is_dir() else package.parent / kind


def find_data(kind: Literal["calibration", "eval"], name: str) -> Path:
    """The file behind a set: a path as given, else the set of that name that ships with the project.

    Raises:
        CalibrationError: there is no such file or set; names the nearest sets and lists all.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root = data_root(kind)
    return _named(name, root, "calibration set" if kind == "calibration" else "evaluation set")


def _named(name: str, folder: Path, what: str) -> Path:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    known = ", ".join(names) or "none"
    raise CalibrationError(f"no {what} '{name}'{_suggest(name, names)}; there are: {known}, or give a file")


def _suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


# ---------------------------------------------------------------------------------------- definitions


@dataclass(frozen=True)
class TextSet:
    """One calibration or evaluation set; exactly one of `files`, `hub` and `mix` says where the text is."""

    name: str
    description: str = ""
    licence: str = ""
    attribution: str = ""
    files: tuple[Path, ...] = ()
    hub: Mapping[str, str] = field(default_factory=dict)
    mix: Mapping[str, float] = field(default_factory=dict)
    format: str = ""
    column: str = "text"
    path: Path | None = None  # the definition's own file; a mix looks for its parts beside it


@dataclass(frozen=True)
class Suite:
    """What `compress score --suite` measures: windows of one text, and a number of items of each task."""

    name: str
    text: str
    windows: int
    length: int
    tasks: Mapping[str, int] = field(default_factory=dict)
    description: str = ""


def load_definition(path: Path) -> TextSet:
    """Read a set's YAML; a text file stands for itself.

    Raises:
        CalibrationError: not YAML, unknown or missing keys, a file that is not there.
    """
    if path.name.endswith(TEXT_SUFFIXES):
        return TextSet(name=path.name, files=(path,), path=path)
    if path.suffix not in (".yaml", ".yml"):
        suffixes = ", ".join(TEXT_SUFFIXES)
        raise CalibrationError(f"{path}: expected a .yaml definition or a text file ({suffixes})")
    raw = _read_yaml(path, {f.name for f in fields(TextSet)} - {"path"}, required={"name"})
    if sum(bool(raw.get(key)) for key in ("files", "hub", "mix")) != 1:
        raise CalibrationError(f"{path}: needs exactly one of 'files', 'hub' and 'mix'")
    if raw.get("format", "") not in ("", "text", "wikitext", "jsonl"):
        raise CalibrationError(f"{path}: format '{raw['format']}' is none of text, wikitext, jsonl")
    if raw.get("files") and not isinstance(raw["files"], list):
        raise CalibrationError(f"{path}: 'files' must be a list, e.g. files: [text.jsonl.xz]")
    hub = raw.get("hub") or {}
    if hub and (not isinstance(hub, dict) or "path" not in hub or set(hub) - HUB_KEYS):
        raise CalibrationError(f"{path}: 'hub' takes path (required), name, split and column")
    mix = raw.get("mix") or {}
    weights = mix.values() if isinstance(mix, dict) else [0]
    if not all(isinstance(weight, int | float) and weight > 0 for weight in weights):
        raise CalibrationError(f"{path}: 'mix' takes the names of other sets, each with a weight above 0")
    files = tuple(path.parent / file for file in raw.get("files") or ())
    return TextSet(**{**raw, "files": files, "hub": hub, "mix": mix, "path": path})


def load_suite(name: str) -> Suite:
    """An evaluation suite by name or path.

    Raises:
        CalibrationError: no such suite, unknown or missing keys.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = _named(name, data_root("eval") / "suites", "evaluation suite")
    raw = _read_yaml(path, {f.name for f in fields(Suite)}, required={"name", "text", "windows", "length"})
    return Suite(**{**raw, "tasks": raw.get("tasks") or {}})


def _read_yaml(path: Path, known: set[str], required: set[str]) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise CalibrationError(f"{path}: expected a mapping with {', '.join(sorted(required))}")
    for key in raw:
        if key not in known:
            listed = ", ".join(sorted(known))
            raise CalibrationError(f"{path}: unknown key '{key}'{_suggest(str(key), known)}; known: {listed}")
    if missing := sorted(required - set(raw)):
        raise CalibrationError(f"{path}: missing {', '.join(missing)}")
    return raw
