"""A recipe file, or a bundled recipe by name -> `Recipe`, with every problem of the file at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from compress.errors import RecipeError
from compress.reading import shortened
from compress.recipe.document import read_document
from compress.recipe.problems import explain, impossible
from compress.recipe.rules import nearest
from compress.recipe.schema import Recipe
from compress.text import data_root


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """Read a recipe file, or a bundled recipe by name, with `key=value` overrides applied in order.

    Keys are dotted paths with list indices (`steps[0].quantize.solver.damping=0.05`), values are YAML. Raises
    RecipeError with all problems.
    """
    path = _find(path_or_name)
    document = read_document(path)
    if isinstance(document.data, dict):
        document.data.setdefault("name", path.stem)
        for key, value in (("model", model), ("output", output)):
            if value is not None:
                document.put((key,), value, f"--{key} {value}")
        for text in overrides:
            document.override(text)
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


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = bundled_recipes()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    what = "is a folder, not a recipe" if path.is_dir() else "no such file or bundled recipe"
    raise RecipeError(f"{path_or_name}: {what}{nearest(path.stem, known) if known else ''}")
