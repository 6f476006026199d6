"""A recipe file, a bundled recipe, a type by name or plain values -> `Recipe`, with every problem of the file at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.codecs.names import FIXED_NAMES
from compress.containers import CONTAINERS
from compress.errors import RecipeError
from compress.models.gguf.header import is_gguf
from compress.reading import shortened
from compress.recipe.document import Document, read_document
from compress.recipe.named import named_recipe, output_name
from compress.recipe.paths import find_place
from compress.recipe.problems import explain, impossible
from compress.recipe.rules import closest
from compress.recipe.schema import Recipe
from compress.recipe.schemes import SCHEMES
from compress.text import data_root

RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""A recipe's file, the name of a bundled one or of a type, its keys and values, or one that is read already."""


def load_recipe(
    path_or_name: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
) -> Recipe:
    """Read a recipe file, a bundled recipe by name, what a scheme, codec or container stands for (`named_recipe`), or keys and
    values as a recipe's file has them, with `key=value` overrides applied in order.

    Keys are dotted paths with list indices (`steps[0].quantize.solver.damping=0.05`), or their last parts where these name no
    other (`damping=0.05`); values are YAML. base: what scores compare with;
    adapter: what is merged into the model. Raises RecipeError with all problems.
    """
    given = (
        ("model", ("model",), model), ("output", ("output",), output), ("base", ("score", "base"), base),
        ("adapter", ("adapter",), adapter),
    )  # fmt: skip
    if isinstance(path_or_name, Recipe) and not overrides and all(value is None for *_, value in given):
        return path_or_name
    document, name = _document(path_or_name)
    if isinstance(document.data, dict):
        for option, path, value in given:
            if value is not None:
                document.put(path, value, f"--{option} {value}")
        for text in overrides:
            document.override(text, find_place)
        document.data.setdefault("name", name(document.data.get("model")))
        if isinstance(document.data["name"], str):
            document.data.setdefault("output", f"out/{document.data['name']}")
    problems = document.problems
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems += [
            explain(document, item) for item in error.errors(include_url=False) if item["loc"] not in document.unread
        ]
    problems += [document.at(where, what) for where, what in impossible(document.data)]
    if problems:
        raise RecipeError(shortened(sorted(dict.fromkeys(problems), key=document.line_of)))
    return recipe


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(data_root("recipes").glob("*.yaml"))}


@dataclass(frozen=True)
class About:
    """A bundled recipe in a few words. when: to choose it, from the head of its file; codecs: those that its rules name, or its
    scheme."""

    name: str
    when: str
    steps: tuple[str, ...]
    codecs: tuple[str, ...]
    containers: tuple[str, ...]


def about_recipes() -> tuple[About, ...]:
    """Every bundled recipe, in the order of their names."""
    return tuple(_about(name, path) for name, path in bundled_recipes().items())


def _about(name: str, path: Path) -> About:
    recipe = load_recipe(path)
    head = path.read_text(encoding="utf-8").partition("\nname:")[0].partition("\n#\n")[0]
    when = " ".join(line.lstrip("# ") for line in head.splitlines()).removeprefix("When to choose this: ")
    quantize = recipe.step("quantize")
    codecs = [] if quantize is None else [quantize.scheme, *(rule.codec for rule in quantize.rules)]
    steps, containers = tuple(step.kind for step in recipe.steps), tuple(c.name for c in recipe.containers)
    return About(name, when, steps, tuple(dict.fromkeys(codec for codec in codecs if codec)), containers)


def _document(path_or_name: RecipeLike) -> tuple[Document, Callable[[Any], str]]:
    """A recipe's plain values, and what it is called where it does not say, given its model: by its file, by model and type, or
    "recipe"."""
    if isinstance(path_or_name, Recipe | Mapping):
        document = Document("{}", "recipe")
        document.data = plain(path_or_name.as_dict() if isinstance(path_or_name, Recipe) else path_or_name)
        return document, lambda model: "recipe"
    path, name = Path(path_or_name), str(path_or_name)
    if path.is_file():
        if is_gguf(path):
            raise RecipeError(f"{path} is a model, not a recipe; compress it with: compress run Q4_K_M --model {path}")
        return read_document(path), lambda model: path.stem
    known = bundled_recipes()
    found = (name, name) if name in known else named_recipe(name)
    if found is None:
        raise RecipeError(_unknown(path, known))
    kind, keys = found
    if isinstance(keys, str):
        return read_document(known[keys]), lambda model: keys
    document = Document("{}", kind)
    document.data = keys
    return document, lambda model: output_name(model, kind) if isinstance(model, str) else kind


def plain(value: Any) -> Any:
    """Python's values as YAML has them: tuples are lists, paths texts; all of them new."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    return str(value) if isinstance(value, Path) else value


def _unknown(path: Path, known: Mapping[str, Path]) -> str:
    if path.is_dir():
        model = " but a model" if (path / "config.json").is_file() else ""
        return f"{path}: is a folder, not a recipe{model}; compress a model with: compress run Q4_K_M --model FOLDER"
    near = closest(path.name, (*known, *SCHEMES, *CONTAINERS, *FIXED_NAMES))
    told = f"; nearest: {', '.join(near)}" if near else "; `compress recipes` and `compress methods` list them"
    return f"{path}: no such file, bundled recipe or type{told}"
