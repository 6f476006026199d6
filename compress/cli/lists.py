"""compress methods, compress recipes: what there is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from compress.cli.app import load_plugins, show
from compress.cli.options import JsonOption, PluginOption


def methods(
    families: Annotated[
        bool, typer.Option("--families", help="The families of models instead, with what works on each.")
    ] = False,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what a recipe can be made of: steps, solvers, codecs with bits per weight, containers and their engines; which models."""
    load_plugins(plugin)
    if as_json:
        from compress.catalog import as_dict

        found = as_dict()
        typer.echo(json.dumps(found["families"] if families else found))
        return
    from compress.report.methods_table import families_table, methods_table

    show(families_table() if families else methods_table())


def recipes(as_json: JsonOption = False) -> None:
    """List the bundled recipes, each with when to choose it."""
    from compress.recipe import about_recipes

    found = about_recipes()
    if as_json:
        typer.echo(json.dumps([asdict(recipe) for recipe in found]))
        return
    from compress.report.methods_table import recipes_table

    show(recipes_table(found))
