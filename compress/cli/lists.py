"""compress methods, compress recipes: what there is."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from compress.cli.app import load_plugins, show
from compress.cli.options import JsonOption, PluginOption


def methods(plugin: PluginOption = None, as_json: JsonOption = False) -> None:
    """List what a recipe can be made of: steps, solvers, codecs with bits a weight, containers and their engines."""
    load_plugins(plugin)
    if as_json:
        from compress.catalog import as_dict

        typer.echo(json.dumps(as_dict()))
        return
    from compress.report.methods_table import methods_table

    show(methods_table())


def recipes(as_json: JsonOption = False) -> None:
    """List the bundled recipes, each with when to choose it."""
    from compress.recipe import about_recipes

    found = about_recipes()
    if as_json:
        typer.echo(json.dumps([asdict(recipe) for recipe in found]))
        return
    from compress.report.methods_table import recipes_table

    show(recipes_table(found))
