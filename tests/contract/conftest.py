"""One tiny model of every family for all contracts."""

from __future__ import annotations

import json
from functools import cache

import pytest

from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from tests.contract.blocks import SMALL, Families
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    @cache
    def make(name: str):  # type: ignore[no-untyped-def]
        folder = tiny_model(name, tmp_path_factory.mktemp(name), tokenizer=False, **SMALL)
        spec = load_spec(json.loads((folder / "config.json").read_text()))
        checkpoint = Checkpoint.open(folder)
        return spec, {t.name: checkpoint.load(t.name).double() for t in spec.tensors()}, folder

    return make
