"""YAML text with the place each value came from, so that every problem of a recipe can name its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from compress.errors import RecipeError

# YAML 1.2's core types only: with 1.1's rules `1e-3` is a string, `no` a bool and `4:30` the number 270.
_SCALARS = (
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
Place = tuple[str | int, ...]


class Document:
    """Plain values of a YAML text, where each came from, and the problems met while reading."""

    def __init__(self, label: str):
        self.label = label
        self.data: Any = None
        self.origins: dict[Place, str] = {(): label}
        self.problems: list[str] = []

    def at(self, path: Place, what: str) -> str:
        """One problem line for the value at `path`, or for the nearest parent that is written down."""
        known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in self.origins)
        where = dotted(path)
        return f"{self.origins[known]}: {where}: {what}" if where else f"{self.origins[known]}: {what}"

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

    def override(self, text: str) -> None:
        """Apply one `key=value`; what is wrong with it becomes a problem."""
        key, equals, value = text.partition("=")
        path = _parse_path(key.strip())
        if not equals or path is None:
            self.problems.append(f"--set {text}: expected key=value, e.g. calibration.samples=64")
            return
        try:
            parsed = _parse(value, f"--set {text}")
            self.problems += parsed.problems
            self.put(path, parsed.data, f"--set {text}")
        except RecipeError as error:
            self.problems += error.problems
        except IndexError:
            self.problems.append(f"--set {text}: {dotted(path)}: the list is shorter than that")
        except (TypeError, AttributeError):
            self.problems.append(f"--set {text}: {dotted(path)}: there is no such place in this recipe")


def read_document(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from None
    document = _parse(text, str(path), lines=True)
    if document.data is None and not document.problems:
        raise RecipeError(f"{path}: the recipe is empty; see docs/recipes.md")
    return document


def _parse(text: str, label: str, *, lines: bool = False) -> Document:
    """YAML text to a document; with `lines`, origins are `label:line`. Syntax errors raise RecipeError."""
    document = Document(label)

    def origin(node: yaml.Node) -> str:
        return f"{label}:{node.start_mark.line + 1}" if lines else label

    def build(node: yaml.Node, path: Place, parents: tuple[int, ...]) -> Any:
        document.origins.setdefault(path, origin(node))
        if id(node) in parents:
            document.problems.append(document.at(path, "this alias contains itself"))
            return None
        if not node.tag.endswith((":str", ":seq", ":map")):
            document.problems.append(document.at(path, f"YAML tags like {node.tag!r} have no meaning here"))
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*path, i), (*parents, id(node))) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                if key in mapping:
                    document.problems.append(f"{origin(key_node)}: {dotted((*path, key))}: given twice")
                    continue
                document.origins[(*path, key)] = origin(key_node)
                mapping[key] = build(value_node, (*path, key), (*parents, id(node)))
            return mapping
        return node.value if node.style in ("'", '"', "|", ">") else _scalar(node.value)

    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if lines and mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{label}{line}: not valid YAML: {reason}") from None
    if root is not None:
        document.data = build(root, (), ())
        document.origins[()] = f"{label}:1" if lines else label
    return document


class _Loader(yaml.SafeLoader):
    """SafeLoader that guesses no types: scalars without a tag stay strings, and we read them ourselves."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


def _scalar(text: str) -> Any:
    for pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            return convert(text)
    return text


def _parse_path(text: str) -> Place | None:
    """'steps[0].quantize' -> ('steps', 0, 'quantize'); None when malformed."""
    if not re.fullmatch(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", text):
        return None
    return tuple(int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"\w+|\[\d+\]", text))


def dotted(path: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
