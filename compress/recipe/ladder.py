"""A ladder: one model in several types, as publishers put them on the hub; a recipe for each, carried out together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.errors import RecipeError
from compress.recipe.load import load_recipe
from compress.recipe.named import named_recipe, output_name
from compress.recipe.schema import Recipe

USUAL = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_M")
"""What is made where nobody says which types."""
INPUTS = "steps[0].quantize.inputs"


@dataclass(frozen=True)
class Ladder:
    """Recipes that are carried out together, by what tells their artifacts apart; a single one by None.

    All are of one model, calibrated and scored alike; several have solvers that see the original's inputs.
    """

    name: str
    output: str
    recipes: Mapping[str | None, Recipe]


def load_ladder(
    types: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
) -> Ladder:
    """The ladder of a model. types: as `compress run` takes them; overrides: `key=value`, for each of the recipes; base, adapter:
    as of `load_recipe`.

    Raises RecipeError for what is no type, for one that is named twice, and as `load_recipe`.
    """
    recipes: dict[str | None, Recipe] = {}
    for name in types:
        found = named_recipe(name)
        if found is None or isinstance(found[1], str):
            raise RecipeError(f"{name or 'an empty name'} is no type; a ladder takes types like Q4_K_M, IQ2_M or W4A16")
        kind, keys = found
        if kind in recipes:
            raise RecipeError(f"{kind} is there twice; name each type once")
        own = [f"{INPUTS}=original"] if not isinstance(keys, str) and keys["steps"] else []
        recipes[kind] = load_recipe(kind, [*own, *overrides], model=model, output=output, base=base, adapter=adapter)
    if not recipes:
        raise RecipeError("no type is named; give some, as Q8_0,Q4_K_M,IQ2_M")
    first, *others = recipes.values()
    name = ladder_name(first.model, list(recipes.values()))
    folder = output or f"out/{name}"
    together = {kind: recipe.model_copy(update={"output": folder}) for kind, recipe in recipes.items()}
    for other in others:
        if (other.calibration, other.score, other.seed) != (first.calibration, first.score, first.seed):
            raise RecipeError("the types of a ladder are calibrated and scored alike; give --set for all of them")
    return Ladder(name, folder, together)


def ladder_name(model: str, recipes: Sequence[Recipe]) -> str:
    """What the folder of a model's types is called, as repositories on the hub are: Qwen3-0.6B-GGUF."""
    containers = {export.container for recipe in recipes for export in recipe.export}
    return output_name(model, next(iter(containers)).upper() if len(containers) == 1 else "ladder")
