"""A ladder: the files are those of single runs that see the original's inputs, the importance matrix is what the original
multiplies, one scorecard tells of all, and a killed one continues to the same bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from compress.errors import RecipeError
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.recipe.ladder import Ladder, load_ladder
from compress.report import scorecard as scorecards
from compress.report.checksums import verify
from compress.run import load_calibration, run, run_ladder, units
from tests.integration.runs import SMALL, demo_blocks, final_names, sha256, text_file
from tests.tiny import tiny_model

TYPES = ("Q8_0", "Q4_0", "IQ4_NL")


def _sets(folder: Path) -> tuple[str, ...]:
    return (*SMALL, f"calibration.dataset={text_file(folder / 'text.txt')}", "sweeps=1", "refits=1")


def _ladder(model: Path, folder: Path, types: tuple[str, ...] = TYPES) -> Ladder:
    return load_ladder(types, _sets(folder), model=str(model), output=str(folder / "ladder"))


@pytest.mark.parametrize("kind", ["llama", "demo"])
def test_every_file_is_that_of_a_run_of_its_own(kind: str, tmp_path: Path) -> None:
    model = demo_blocks(tmp_path / "model", 1) if kind == "demo" else tiny_model(kind, tmp_path / "model")
    card = run_ladder(_ladder(model, tmp_path))
    assert [artifact.variant for artifact in card.artifacts] == list(TYPES)
    for artifact in card.artifacts:
        sets = ("inputs=original", *_sets(tmp_path))
        alone = load_recipe(artifact.variant, sets, model=str(model), output=str(tmp_path / artifact.variant))
        single = run(alone)
        assert artifact.path == single.artifacts[0].path
        assert artifact.sha256 == single.artifacts[0].sha256
    assert set(verify(tmp_path / "ladder").values()) == {"ok"}
