"""`compress methods --families`: what works on which models, from declarations alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from compress import catalog
from compress.containers import CONTAINERS
from compress.models import known_families
from compress.models.wrappers import WRAPPERS
from compress.report.methods_table import families_table

LINES = {kind: line for line in catalog.families() for kind in line.model_types}


def test_every_family_is_listed_once() -> None:
    families = {id(family): family for family in known_families().values()}.values()
    assert len(catalog.families()) == len(families) == len({line.name for line in catalog.families()})
    assert set(LINES) >= set(known_families()) | {other for family in families for other in family.also}


def test_multimodal_models_are_listed_with_their_language_models() -> None:
    known = set(known_families())
    for kind, wrapper in WRAPPERS.items():
        assert (kind in LINES) == bool(set(wrapper.families) & known)
    assert "qwen3_5_moe" in LINES["qwen3_5_moe_text"].model_types


def test_what_does_not_work_has_the_plans_reason() -> None:
    line = LINES["qwen3_5_moe_text"]
    assert line.archs == ("qwen35moe",) and not line.steps["rotate"] and not line.steps["prune_experts"]
    assert "mix tokens in another way" in line.steps["drop_layers"]
    assert line.steps["prune heads"].startswith("heads of linear attention cannot be pruned")
    assert "no routed experts" in LINES["llama"].steps["prune_experts"]
    assert "R2" in LINES["olmo2"].steps["rotate"]


def test_examples_stand_for_models_that_every_container_knows() -> None:
    """A family whose example no llama.cpp would read would be listed as one that it cannot read."""
    for line in catalog.families():
        assert set(line.containers) == set(CONTAINERS)
        assert not line.containers["gguf"] and not line.containers["safetensors"], line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(families_table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert all(kind in text.replace("\n", "") for kind in ("qwen3_5_text", "gpt-oss"))


def test_the_list_needs_no_torch() -> None:
    code = "import sys, json; from compress.catalog import families; print(json.dumps([len(families()), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(catalog.families()), False]
