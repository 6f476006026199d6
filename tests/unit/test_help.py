"""Every command says what it is, names values instead of Python's types, and ends with examples that it takes."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from compress.cli import app
from compress.cli.examples import EXAMPLES, START

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands


def shown(*arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments], prog_name="compress", env={"COLUMNS": "120", "TERM": "dumb"}).stdout


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    assert all(2 <= len(lines) <= 3 for lines in EXAMPLES.values())


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_understood(line: str) -> None:
    program, name, *arguments = shlex.split(line.rpartition("| ")[2])
    assert program == "compress" and len(line) <= 58, "narrow screens show it whole"
    COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_names_values_and_ends_with_examples(name: str) -> None:
    text = shown(*([name] if name else []), "-h")
    assert text == shown(*([name] if name else []), "--help")
    assert "<" not in text and "Usage: compress" in text
    for line in EXAMPLES.get(name, START):
        assert line in text


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_take_a_value_say_which(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.is_flag if getattr(parameter, "is_flag", False) else parameter.metavar, parameter.name
        assert parameter.help, parameter.name
