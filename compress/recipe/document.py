"""YAML text with the place each value came from, so that every problem of a recipe can name its line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.limits import YAML_BYTES
from compress.reading import Place, Unreadable, Yaml, dotted, read_text, shown


class Document:
    """Plain values of a YAML text, where each came from, and the problems met while reading."""

    def __init__(self, text: str, label: str, *, lines: bool = False):
        """With `lines`, origins are `label:line`. RecipeError where the text cannot be read at all."""
        self.label = label

        def origin(line: int | None) -> str:
            return f"{label}:{line}" if lines and line is not None else label

        try:
            read = Yaml(text)
        except Unreadable as error:
            raise RecipeError(f"{origin(error.line)}: {error}") from None
        self.data = read.data
        self.origins = {path: origin(line) for path, line in read.lines.items()}
        self.origins[()] = origin(1)
        self.problems = [_line(origin(line), path, what) for line, path, what in read.problems]
        self.unread = read.unread

    def at(self, path: Place, what: str) -> str:
        """One problem line for the value at `path`, for what an override put into it, or for the nearest parent that is
        written down."""
        inside = [place for place in self.origins if len(place) > len(path) and place[: len(path)] == path]
        known = inside[:1] if path not in self.origins else []
        known += [path[:end] for end in range(len(path), -1, -1) if path[:end] in self.origins]
        return _line(self.origins[known[0]], path, what)

    def line_of(self, problem_line: str) -> float:
        """Where a problem line points in the file; overrides come last."""
        match = re.match(re.escape(self.label) + r":(\d+)", problem_line)
        return int(match[1]) if match else float("inf")

    def put(self, path: Place, value: Any, origin: str) -> None:
        """Set a value below the root, making mappings on the way; IndexError or TypeError when it has no
        place.
        """
        here: Any = self.data
        for depth, key in enumerate(path[:-1]):
            if isinstance(here, list) != isinstance(key, int):
                raise TypeError
            following = here[key] if isinstance(key, int) else here.get(key)
            if key == "solver" and isinstance(following, str):
                following = {"name": following}
            elif following is None or (isinstance(path[depth + 1], str) and isinstance(following, bool)):
                following = {}
            here[key] = following
            here = following
        if isinstance(here, list) and path[-1] == len(here):
            here.append(value)
        elif isinstance(here, dict) and isinstance(path[-1], int):
            raise TypeError
        else:
            here[path[-1]] = value
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}
        self.origins[path] = origin

    def override(self, text: str, find: Callable[[str, Any], Place | str]) -> None:
        """Apply one `key=value`; what is wrong with it becomes a problem. find: where a key belongs in the plain values, or
        why nowhere."""
        key, equals, value = text.partition("=")
        label = f"--set {shown(text)}"
        if not equals:
            self.problems.append(f"{label}: expected key=value, e.g. calibration.samples=64")
            return
        path = find(key.strip(), self.data)
        if isinstance(path, str):
            self.problems.append(f"{label}: {path}")
            return
        try:
            parsed = Document(value, label)
            self.problems += parsed.problems
            self.unread |= {(*path, *below) for below in parsed.unread}
            self.put(path, parsed.data, label)
        except RecipeError as error:
            self.problems += error.problems
        except IndexError:
            self.problems.append(f"{label}: {dotted(path)}: the list is shorter than that")
        except (TypeError, AttributeError):
            self.problems.append(f"{label}: {dotted(path)}: there is no such place in this recipe")


def read_document(path: Path) -> Document:
    """A recipe's file. Raises RecipeError where it cannot be read, is too large or empty."""
    try:
        document = Document(read_text(path, YAML_BYTES), str(path), lines=True)
    except (Unreadable, FileNotFoundError) as error:
        raise RecipeError(f"{path}: {error}") from None
    if document.data is None and not document.problems:
        raise RecipeError(f"{path}: the recipe is empty; see docs/recipes.md")
    return document


def _line(origin: str, path: Place, what: str) -> str:
    where = dotted(path)
    return f"{origin}: {where}: {what}" if where else f"{origin}: {what}"
