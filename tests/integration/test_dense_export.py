"""Dense folders of models that no engine here holds whole: scored by their decoded weights, which are rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compress.containers import CONTAINERS
from compress.containers.base import TRANSFORMERS
from tests.integration.runs import carry_out, small
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_to_the_own_type_passes_the_gate(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = replace(CONTAINERS["safetensors"], engine=replace(TRANSFORMERS, largest=0))
    monkeypatch.setitem(CONTAINERS, "safetensors", dense)
    model = tiny_model("llama", tmp_path / "model", dtype=dtype)
    sets = ("export=[{container: safetensors}]", "steps=[{quantize: {solver: rtn, scheme: W4A16G32}}]")
    card = carry_out(small("gptq-w4-g128", model, tmp_path / "out", *sets))
    assert card.gate.passed
    assert [f.used for f in card.fallbacks] == ["scored by its decoded weights"]
