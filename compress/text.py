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
import json
import lzma
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from compress.errors import CalibrationError, CheckpointError, MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataKind = Literal["recipes", "calibration", "eval", "models"]
TEXT_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")
TOKENIZE_TOGETHER = 16
HUB_SHUFFLE_BUFFER = 10_000
HUB_KEYS = {"path", "name", "split", "column"}


# ---------------------------------------------------------------------------------- finding the data


def data_root(kind: DataKind) -> Path:
    """The folder of shipped data: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
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


# ------------------------------------------------------------------------------------------ documents


def load_documents(definition: TextSet, *, seed: int | None = None) -> Iterator[str]:
    """The non-empty documents of a set: in file order, or shuffled by `seed`.

    A mix takes the next document from the part that is furthest behind its weight, counted in characters, and
    ends when that part has no more, so the proportions hold over any prefix.

    Raises:
        CalibrationError: a file is missing or damaged, a column is missing, the hub cannot be reached.
        MissingExtra: a hub set without the `datasets` package.
    """
    if definition.mix:
        yield from _mixed(definition, seed)
    elif definition.hub:
        yield from _hub_documents(definition, seed)
    else:
        texts = (text for file in definition.files for text in _file_documents(file, definition))
        documents = [text for text in texts if text.strip()]
        if seed is not None:
            random.Random(seed).shuffle(documents)
        yield from documents


def _file_documents(file: Path, definition: TextSet) -> Iterator[str]:
    kind = definition.format or ("jsonl" if ".jsonl" in file.name else "text")
    if kind == "jsonl":
        for number, row in _json_lines(file):
            text = row.get(definition.column)
            if not isinstance(text, str):
                fix = "set 'column' to the field that holds it"
                raise CalibrationError(f"{file}, line {number}: no text in '{definition.column}'; {fix}")
            yield text
        return
    text = _read_text(file)
    if kind == "wikitext":
        # The rows of the hub's "wikitext" set joined by blank lines, the text of most published perplexities:
        # a row is a line with its end, or nothing where the line is blank.
        lines = text.removesuffix("\n").split("\n")
        text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    yield text


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(f"{file}: no such file; it is named by the set's definition") from None
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: damaged or not UTF-8 text ({error})") from error


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not str.splitlines(): a JSON string may hold U+2028, which that takes for a line end.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'{file}, line {number}: expected an object, e.g. {{"text": "..."}}')
        yield number, row


def _mixed(definition: TextSet, seed: int | None) -> Iterator[str]:
    parts = {}
    for name in definition.mix:
        part = load_definition(_beside(definition, name))
        if part.mix:
            raise CalibrationError(f"{definition.path}: '{name}' is itself a mix; name its parts instead")
        parts[name] = load_documents(part, seed=seed)
    taken = dict.fromkeys(parts, 0.0)
    while True:
        behind = min(taken, key=lambda name: taken[name])
        document = next(parts[behind], None)
        if document is None:
            return
        taken[behind] += len(document) / definition.mix[behind]
        yield document


def _beside(definition: TextSet, name: str) -> Path:
    folder = definition.path.parent if definition.path else data_root("calibration")
    path = folder / f"{name}.yaml"
    return path if path.is_file() else find_data("calibration", name)


def _hub_documents(definition: TextSet, seed: int | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra("datasets", "hub", f"the set '{definition.name}'") from error
    hub = definition.hub
    column = hub.get("column", definition.column)
    try:
        rows = load_dataset(hub["path"], hub.get("name"), split=hub.get("split", "train"), streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_BUFFER)
        for row in rows:
            if column not in row:
                columns = ", ".join(row)
                raise CalibrationError(f"hub set '{hub['path']}' has no column '{column}'; it has: {columns}")
            if row[column].strip():
                yield row[column]
    except (OSError, ValueError) as error:  # no network, no such set, config or split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "check the name and the network, or use a local set"
        raise CalibrationError(f"cannot read hub set '{hub['path']}': {reason}; {fix}") from error


def task_documents(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows (all if None) of a bundled task, e.g. "blimp" or "lambada", as in its file.

    BLiMP's rows go round the 67 phenomena, so a limit that is a multiple of 67 weighs them equally.

    Raises:
        CalibrationError: no such task, or not a set of JSON lines.
    """
    definition = load_definition(find_data("eval", name))
    if not definition.files or not all(".jsonl" in file.name for file in definition.files):
        raise CalibrationError(f"'{name}' is not a task: it holds no JSON lines")
    rows = (row for file in definition.files for _, row in _json_lines(file))
    return list(islice(rows, limit))


# -------------------------------------------------------------------------------------------- windows


def calibration_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    max_positions: int | None = None,
) -> np.ndarray:
    """Token ids of calibration text, int32 [samples, length].

    Documents are shuffled by `seed`, tokenized without special tokens, each followed by the end-of-text token
    (where the tokenizer has one), and packed into full windows: no padding, and the same arguments give the
    same array. Fewer samples with the same seed are a prefix of more.

    Raises:
        CalibrationError: no such set, no text, too few tokens, or windows longer than `max_positions`.
    """
    _check_sizes(samples, length, max_positions, "samples")
    definition = load_definition(find_data("calibration", name))
    documents = load_documents(definition, seed=seed)
    tokens = _tokens(documents, tokenizer, samples * length)
    if len(tokens) == 0:
        raise CalibrationError(f"calibration set '{name}' holds no text")
    if len(tokens) < samples * length:
        raise CalibrationError(_too_few("calibration set", name, len(tokens), samples, length, "samples"))
    return tokens.reshape(samples, length)


def eval_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None = None,
    length: int,
    max_positions: int | None = None,
) -> np.ndarray:
    """Token ids of evaluation text, int32 [windows, length]; every full window if `windows` is None.

    Documents come in file order, tokenized and packed as for calibration, and windows do not overlap. Where
    the tokenizer starts texts with a beginning-of-text token (`prepends_bos`), every window is that token and
    `length - 1` tokens of text: without it Llama-like models score far worse than in use. Nothing predicts
    the first token of a window, so the added one is never scored.

    Raises:
        CalibrationError: as `calibration_windows`.
    """
    _check_sizes(1 if windows is None else windows, length, max_positions, "windows")
    bos = [tokenizer.bos_token_id] if prepends_bos(tokenizer) else []
    text_length = length - len(bos)
    documents = load_documents(load_definition(find_data("eval", name)))
    tokens = _tokens(documents, tokenizer, None if windows is None else windows * text_length)
    if len(tokens) == 0:
        raise CalibrationError(f"evaluation set '{name}' holds no text")
    if len(tokens) < (windows or 1) * text_length:
        too_few = _too_few("evaluation set", name, len(tokens), windows or 1, text_length, "windows")
        raise CalibrationError(too_few)
    count = len(tokens) // text_length if windows is None else windows
    text = tokens[: count * text_length].reshape(count, text_length)
    start = np.tile(np.asarray(bos, dtype=np.int32), (count, 1))
    return np.concatenate([start, text], axis=1) if bos else text


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts its beginning-of-text token before a text unless told otherwise."""
    if tokenizer.bos_token_id is None:
        return False
    return list(tokenizer("a").input_ids[:1]) == [tokenizer.bos_token_id]


def _tokens(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> np.ndarray:
    """Ids of `documents`, each closed by the end-of-text token; int32, cut at `wanted` (None: all)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    count = 0
    while (wanted is None or count < wanted) and (batch := list(islice(documents, TOKENIZE_TOGETHER))):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            pieces.append(np.asarray([*ids, *end], dtype=np.int32))
            count += len(pieces[-1])
    return np.concatenate(pieces)[:wanted] if pieces else np.empty(0, dtype=np.int32)


def _check_sizes(count: int, length: int, max_positions: int | None, what: str) -> None:
    if count < 1 or length < 2:
        raise CalibrationError(f"{what} must be at least 1 and length at least 2, not {count} and {length}")
    if max_positions is not None and length > max_positions:
        limit = f"the {max_positions} positions of the model"
        raise CalibrationError(f"length {length} is more than {limit}; set length to at most {max_positions}")


def _too_few(what: str, name: str, tokens: int, count: int, length: int, field_name: str) -> str:
    fit = tokens // length
    fix = f"set {field_name} to at most {fit}" if fit else f"set length to at most {tokens}"
    need = f"{count} {field_name if count > 1 else 'window'} of {length} need {count * length:,}"
    return f"{what} '{name}' has {tokens:,} tokens, but {need}; {fix}, or use another set"


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer; CheckpointError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} has no tokenizer that loads ({line}); fetch tokenizer.json too") from None
