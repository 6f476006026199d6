"""Recipes: YAML -> frozen `Recipe`, strict. No torch."""

from compress.recipe.load import about_recipes, bundled_recipes, load_recipe
from compress.recipe.schema import Recipe

__all__ = ["Recipe", "about_recipes", "bundled_recipes", "load_recipe"]
