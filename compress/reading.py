"""Files that users give, read within the limits of `compress.limits`: text, JSON, YAML; what is wrong with one, in words.

Sizes are asked before a file is opened, and only regular files are: a pipe would keep its reader waiting for ever.
"""

from __future__ import annotations

import json
import math
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from compress.errors import CheckpointError
from compress.limits import (
    FOLDER_LENGTH,
    JSON_BYTES,
    MOST_PROBLEMS,
    NUMBER_LENGTH,
    TEXT_LENGTH,
    YAML_DEPTH,
    YAML_VALUES,
)

Place = tuple[str | int, ...]


class Unreadable(Exception):
    """Why a file or a text cannot be read, for callers to put in an error of their own; line: where, from 1, or None."""

    def __init__(self, why: str, line: int | None = None):
        super().__init__(why)
        self.line = line


# ------------------------------------------------------------------------------------------ files


def size_of(path: Path) -> int:
    """Bytes of a regular file. Raises FileNotFoundError, or Unreadable where it is a folder, a pipe or a device."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise Unreadable(f"cannot be read: it is {what}, not a file")
    return found.st_size


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most `most` bytes. Raises FileNotFoundError, or Unreadable."""
    if (size := size_of(path)) > most:
        raise Unreadable(f"has {size:,} bytes; at most {most:,} are read")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8 text") from None
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------- JSON


def parse_json(text: str) -> Any:
    """JSON whose mappings name every key once. Raises Unreadable."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair could be written nowhere
        return found
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError as error:  # of json, or an integer of thousands of digits
        raise Unreadable(f"is not valid JSON ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The mapping in a JSON file of a model folder. Raises CheckpointError, which names the file and the fix."""
    try:
        found = parse_json(read_text(path, most))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a Hugging Face model folder?") from None
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not valid: expected a mapping, got {in_words(found)}; fetch it again")
    return found


# ------------------------------------------------------------------------------------------- YAML

# YAML 1.2's core types only: with 1.1's rules `1e-3` is a string, `no` a bool and `4:30` the number 270.
_SCALARS: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that guesses no types: scalars without a tag stay strings, and we read them ourselves. Counts what it
    composes, so that it stops early."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.values += 1
        line = self.peek_event().start_mark.line + 1
        if self.depth > YAML_DEPTH:
            raise Unreadable(f"nested more than {YAML_DEPTH} levels deep", line)
        if self.values > YAML_VALUES:
            raise Unreadable(f"holds more than {YAML_VALUES:,} values", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Yaml:
    """Plain values of a YAML text, the line each came from, and what else is wrong with it, by place."""

    def __init__(self, text: str):
        """Raises Unreadable: not YAML, too deep, too much."""
        self.lines: dict[Place, int] = {}
        self.problems: list[tuple[int, Place, str]] = []
        self.unread: set[Place] = set()
        """Places whose values could not be read, of which nothing more need be said."""
        self._values = 0
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise Unreadable(f"not valid YAML: {reason}", None if mark is None else mark.line + 1) from None
        except ValueError as error:  # a code point that is none
            raise Unreadable(f"not valid YAML: {error}") from None
        self.data = None if root is None else self._build(root, (), ())

    def _build(self, node: yaml.Node, path: Place, parents: tuple[int, ...]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._values += 1
        if self._values > YAML_VALUES:
            raise Unreadable(f"holds more than {YAML_VALUES:,} values once its aliases are written out", line)
        if id(node) in parents:
            return self._wrong(line, path, "this alias contains itself")
        if len(parents) > YAML_DEPTH:
            raise Unreadable(f"nested more than {YAML_DEPTH} levels deep once its aliases are written out", line)
        if not node.tag.endswith((":str", ":seq", ":map")):
            self.problems.append((line, path, f"YAML tags like {shown(node.tag)!r} have no meaning here"))
        inside = (*parents, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i), inside) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, inside)
        if why := text_problem(node.value):
            return self._wrong(line, path, why)
        try:
            return node.value if node.style in ("'", '"', "|", ">") else _scalar(node.value)
        except ValueError as error:
            return self._wrong(line, path, str(error))

    def _mapping(self, node: yaml.MappingNode, path: Place, parents: tuple[int, ...]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if why := "a key is text" if key == "?" else text_problem(key):
                self._wrong(line, path, why)
            elif key in mapping:
                self.problems.append((line, (*path, key), "given twice"))
            else:
                self.lines[*path, key] = line
                mapping[key] = self._build(value_node, (*path, key), parents)
        return mapping

    def _wrong(self, line: int, path: Place, what: str) -> None:
        self.problems.append((line, path, what))
        self.unread.add(path)


def _scalar(text: str) -> Any:
    for pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            if len(text) > NUMBER_LENGTH:
                raise ValueError(f"a number of {len(text):,} characters; at most {NUMBER_LENGTH} are read")
            value = convert(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{text} is no finite number")
            return value
    return text


# ------------------------------------------------------------------------------------------- words

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "is_instance_of": "a solver's name or options",
}
"""What pydantic's types of errors say was expected."""

_BOUNDS = (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))


def wrong(error: Any) -> str:
    """What one of pydantic's errors found, in words, without its place."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in EXPECTED:
        return f"expected {EXPECTED[kind]}, got {in_words(given)}"
    if kind == "missing":
        return "missing"
    if kind == "too_short":
        return "expected at least one item"
    if kind == "too_long":
        return f"expected at most {context['max_length']:,} items"
    for name, words in _BOUNDS:
        if name in context:
            bound = context[name]
            return f"must be {words} {bound if isinstance(bound, int) else f'{bound:g}'}, got {in_words(given)}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {in_words(given)}"


def in_words(value: Any) -> str:
    """A value of the wrong type, as a message says it."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def dotted(path: Iterable[str | int]) -> str:
    """('steps', 0, 'quantize') -> 'steps[0].quantize'."""
    words = (f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in path)
    return "".join(words).removeprefix(".")


def shown(text: str, most: int = 120) -> str:
    """A text on one line of a message, without what a terminal would not print."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= most else f"{text[:most]}..."


def text_problem(text: str) -> str | None:
    """Why a value is no text that anything here could take."""
    if len(text) > TEXT_LENGTH:
        return f"a text of {len(text):,} characters; at most {TEXT_LENGTH:,} are read"
    odd = next((c for c in text if not c.isprintable() and c not in "\n\t" and unicodedata.category(c) in _ODD), None)
    return None if odd is None else f"holds the control character U+{ord(odd):04X}"


_ODD = ("Cc", "Cs")  # control characters, and halves of a code point


def path_problem(text: str) -> str | None:
    """Why no file system could have such a path."""
    if not text.strip():
        return "expected a path or a name, got nothing"
    longest = max(len(part.encode(errors="replace")) for part in text.split("/"))
    if longest > FOLDER_LENGTH:
        return f"a file or folder name of {longest} bytes; file systems take {FOLDER_LENGTH}"
    return text_problem(text)


def shortened(problems: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    if len(problems) <= MOST_PROBLEMS:
        return list(problems)
    return [*problems[:MOST_PROBLEMS], f"... and {len(problems) - MOST_PROBLEMS:,} more problems"]
