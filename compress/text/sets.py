"""Text in: finds calibration and evaluation sets, reads their documents, packs them into token windows.

A set is a YAML file in `calibration/` or `eval/`, found by name, or any file of the user's own, by path:

    name: mixed                 # required
    description: ...            # required; also licence and attribution
    files: [text.jsonl.xz]      # beside the YAML: kinds in `text/rows.py`
    hub: {path: owner/set, name: config, split: train, column: text}     # or, instead of files, a hub set
    mix: {wikipedia: 4, novels: 1}       # or other sets, by weight
    ends: first | last                   # a mix: with the first part that has no more, or with the last, others going on
    format: text | wikitext | jsonl | json | csv | tsv | parquet         # of the files, when the suffix does not tell
    column: text                         # what of a row holds the document, where its keys do not tell (`text/shapes.py`)

An evaluation suite is a YAML file in `eval/suites/`, or one of the user's own:

    name: standard                       # required
    description: ...
    texts:                               # the first one's scores are the ones that tables show
      wikipedia: {windows: 100}          # evenly spread over the text; without `windows` all there are
      wikitext2: {windows: 40, protocol: llama-perplexity}       # a name in text/protocol.py
      late: {text: wikitext2, length: 1024, stride: 256}         # another text than the name says; fields of a `Protocol`
    tasks:
      blimp: 268                         # documents; more of a task's choices in `TaskChoice`
      gsm8k: {documents: 100, fewshot: 5, chat: true}
    chat_template: false                 # true: tasks that do not say `chat` are asked in it

`text`, `windows` and `length` beside `name` are the short form for a single text. Lengths are in tokens of the given
tokenizer. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from compress.errors import CalibrationError, NoSuchText
from compress.limits import MOST_TARGETS, YAML_BYTES
from compress.reading import Unreadable, Yaml, dotted, path_problem, read_text, shown, wrong
from compress.text.protocol import DEFAULT, PROTOCOLS, Bos, Counted, Joiner, Protocol, ProtocolName
from compress.text.rows import kind_of, suffixes

DataKind = Literal["recipes", "calibration", "eval", "models"]
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
        NoSuchText: there is no such file or set; names the nearest sets and lists all.
    """
    if (path := own_file(name)) is not None:
        return path
    root = data_root(kind)
    if kind == "eval":
        return _named(name, root, "evaluation set")
    return _named(name, root, "calibration set", "a file, a folder or a hub set (owner/name)")


def own_file(name: str) -> Path | None:
    """A file of the user's."""
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # a name that no file can have, the home of nobody
        return None


def _named(name: str, folder: Path, what: str, else_: str = "a file") -> Path:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    known = ", ".join(names) or "none"
    raise NoSuchText(f"no {what} '{shown(name)}'{_suggest(name, names)}; there are: {known}, or give {else_}")


def _suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:64], list(names), n=2, cutoff=0.5)
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
    ends: Literal["first", "last"] = "first"
    format: str = ""
    column: str = ""
    split: str = ""  # of parts on the hub
    path: Path | None = None  # the definition's own file; a mix looks for its parts beside it
    notes: tuple[str, ...] = ()  # what deserves a line


@dataclass(frozen=True)
class SuiteText:
    """One text of a suite: the set, how many of its windows (None: all), and how they are made and counted."""

    text: str
    windows: int | None = None
    protocol: Protocol = DEFAULT


@dataclass(frozen=True)
class TaskChoice:
    """How a suite asks a task: documents (None: all), worked examples before each question (None: as many as the task
    says), in the model's chat template or as plain text, the hub's data although a slice of it is bundled."""

    documents: int | None = None
    fewshot: int | None = None
    chat: bool = False
    hub: bool = False


@dataclass(frozen=True)
class Suite:
    """What `compress score --suite` measures: windows of one or more texts, by a name of each (of a file its own, not where it
    lies), and tasks."""

    name: str
    texts: Mapping[str, SuiteText]
    tasks: Mapping[str, TaskChoice] = field(default_factory=dict)
    description: str = ""


def load_definition(path: Path) -> TextSet:
    """Read a set's YAML; a text file stands for itself.

    Raises:
        CalibrationError: not YAML, unknown or missing keys, a file that is not there.
    """
    if kind_of(path.name) is not None:
        return TextSet(name=path.name, files=(path,), path=path)
    if path.suffix not in (".yaml", ".yml"):
        raise CalibrationError(f"{path}: expected a .yaml definition or a text file ({suffixes()})")
    raw = _read_yaml(path, _Definition)
    if sum(bool(source) for source in (raw.files, raw.hub, raw.mix)) != 1:
        raise CalibrationError(f"{path}: needs exactly one of 'files', 'hub' and 'mix'")
    if raw.hub and ("path" not in raw.hub or set(raw.hub) - HUB_KEYS):
        raise CalibrationError(f"{path}: 'hub' takes path (required), name, split and column")
    return TextSet(**{**raw.model_dump(), "files": tuple(path.parent / file for file in raw.files), "path": path})


def load_suite(name: str) -> Suite:
    """An evaluation suite by name or path.

    Raises:
        CalibrationError: no such suite, unknown or missing keys.
    """
    path = own_file(name) or _named(name, data_root("eval") / "suites", "evaluation suite")
    raw = _read_yaml(path, _Suite)
    if (raw.text is None) == (not raw.texts):
        raise CalibrationError(f"{path}: needs either 'texts', or 'text' with 'windows' and 'length'")
    texts = raw.texts
    if raw.text is not None:
        if raw.windows is None or raw.length is None:
            missing = ", ".join(key for key in ("length", "windows") if getattr(raw, key) is None)
            raise CalibrationError(f"{path}: missing {missing}")
        texts = {raw.text: _SuiteText(windows=raw.windows, length=raw.length)}
    elif raw.windows is not None or raw.length is not None:
        raise CalibrationError(f"{path}: 'windows' and 'length' belong to each of 'texts'")
    named = {(Path(key).name if own_file(key) else key): _suite_text(path, key, text) for key, text in texts.items()}
    if len(named) < len(texts):
        raise CalibrationError(
            f"{path}: two of 'texts' are files of one name; give each a name, and its file as 'text'"
        )
    return Suite(raw.name, named, raw.choices(), raw.description)


def _suite_text(path: Path, key: str, raw: _SuiteText) -> SuiteText:
    changed = raw.model_dump(exclude={"text", "windows", "protocol"}, exclude_none=True)
    protocol = replace(PROTOCOLS[raw.protocol or "default"], **changed)
    if protocol.stride is not None and protocol.stride > protocol.length:
        raise CalibrationError(
            f"{path}: 'texts.{shown(key)}.stride': {protocol.stride} is more than the length of {protocol.length}: "
            "what lies between two windows would not be scored; set it to at most that, or leave it out"
        )
    return SuiteText(raw.text or key, raw.windows, protocol)


def _file_name(value: str) -> str:
    if why := path_problem(value):
        raise ValueError(why)
    return value


FileName = Annotated[str, AfterValidator(_file_name)]


class _File(BaseModel):
    """What a YAML file of this room may say; nulls stand for defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)
    name: str = Field(min_length=1)
    description: str = ""


class _Definition(_File):
    licence: str = ""
    attribution: str = ""
    files: list[FileName] = Field([], max_length=MOST_TARGETS)
    hub: dict[str, str] = {}
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}
    ends: Literal["first", "last"] = "first"
    format: Literal["", "text", "wikitext", "jsonl", "json", "csv", "tsv", "parquet"] = ""
    column: str = ""


Count = Annotated[int, Field(ge=1, le=2**31)]
Length = Annotated[int, Field(ge=2, le=2**31)]


class _SuiteText(BaseModel):
    """One of a suite's texts; what is left out is the protocol's."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)
    text: FileName | None = None
    windows: Count | None = None
    protocol: ProtocolName | None = None
    length: Length | None = None
    stride: Count | None = None
    joiner: Joiner | None = None
    bos: Bos | None = None
    counted: Counted | None = None
    as_file: bool | None = None


_TextOrDefaults = Annotated[_SuiteText, BeforeValidator(lambda given: {} if given is None else given)]


class _Task(BaseModel):
    """What a suite may say of a task."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)
    documents: Count | None = None
    fewshot: Annotated[int, Field(ge=0, le=100)] | None = None
    chat: bool | None = None
    hub: bool = False


def _documents(given: object) -> object:
    """A number alone stands for a task's documents, nothing for all of them."""
    return {"documents": given} if given is None or type(given) is int else given


class _Suite(_File):
    texts: Annotated[dict[FileName, _TextOrDefaults], Field(max_length=MOST_TARGETS)] = {}
    text: FileName | None = None
    windows: Count | None = None
    length: Length | None = None
    tasks: Annotated[dict[FileName, Annotated[_Task, BeforeValidator(_documents)]], Field(max_length=MOST_TARGETS)] = {}
    chat_template: bool = False

    def choices(self) -> dict[str, TaskChoice]:
        """Tasks as they are asked; one that says nothing of the chat template follows the suite."""
        return {
            name: TaskChoice(
                task.documents, task.fewshot, self.chat_template if task.chat is None else task.chat, task.hub
            )
            for name, task in self.tasks.items()
        }


def _fault(fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        return wrong(fault)
    inside: type[BaseModel] = _Task if fault["loc"][0] == "tasks" else _SuiteText  # all other keys inside are free
    known = inside.model_fields
    return f"unknown key{_suggest(str(fault['loc'][-1]), known)}; known: {', '.join(sorted(known))}"


MOST_TOLD = 5
AnyFile = TypeVar("AnyFile", bound=_File)


def _read_yaml(path: Path, schema: type[AnyFile]) -> AnyFile:
    try:
        read = Yaml(read_text(path, YAML_BYTES))
    except (Unreadable, OSError) as error:
        raise CalibrationError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    known = schema.model_fields
    required = sorted(key for key, field in known.items() if field.is_required())
    problems = [f"line {line}: {dotted(place)}: {what}" for line, place, what in read.problems]
    if not isinstance(read.data, dict):
        problems = problems or [f"expected a mapping with {', '.join(required)}"]
        raise CalibrationError(f"{path}: {problems[0]}")
    for key in read.data:
        if key not in known:
            problems.append(f"unknown key '{shown(key)}'{_suggest(key, known)}; known: {', '.join(sorted(known))}")
    if missing := [key for key in required if read.data.get(key) is None]:
        problems.append(f"missing {', '.join(missing)}")
    try:
        found = schema.model_validate({key: value for key, value in read.data.items() if value is not None})
    except ValidationError as error:
        told = ("missing", "extra_forbidden")  # of the whole mapping; deeper ones are not
        faults = (e for e in error.errors(include_url=False) if e["type"] not in told or len(e["loc"]) > 1)
        problems += [f"'{dotted(fault['loc'])}': {_fault(fault)}" for fault in faults]
    if problems:
        raise CalibrationError(f"{path}: {'; '.join(problems[:MOST_TOLD])}")
    return found
