"""What README.md tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from compress.cli import app
from compress.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0] for line in re.findall(r"^compress .*$", README, re.MULTILINE)]


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    recipe = load_recipe(str(path))
    assert recipe.name == "my-moe"
    assert [export.container for export in recipe.export] == ["gguf"]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_bundled_recipes_are_all_named() -> None:
    assert [path.stem for path in (ROOT / "recipes").glob("*.yaml") if f"`{path.stem}`" not in README] == []
