"""Dense folders of models that no engine here holds whole: scored by their decoded weights, which are rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.containers import CONTAINERS
from compress.containers.base import TRANSFORMERS, Options, WriteRequest
from compress.models import load_spec
from tests.integration.containers import fetcher, plan, spec_of, weights_of
from tests.integration.runs import carry_out, small
from tests.tiny import FAMILIES, tiny_config, tiny_model

STACKED = [family for family in FAMILIES if any(t.declared.stacked for t in load_spec(tiny_config(family)).tensors())]
"""Families whose experts transformers reads out of one tensor a layer only."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_to_the_own_type_passes_the_gate(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = replace(CONTAINERS["safetensors"], engine=replace(TRANSFORMERS, largest=0))
    monkeypatch.setitem(CONTAINERS, "safetensors", dense)
    model = tiny_model("llama", tmp_path / "model", dtype=dtype)
    sets = ("export=[{container: safetensors}]", "steps=[{quantize: {solver: rtn, scheme: W4A16G32}}]")
    card = carry_out(small("gptq-w4-g128", model, tmp_path / "out", *sets))
    assert card.gate.passed
    assert [f.used for f in card.fallbacks] == ["scored by its decoded weights"]


@pytest.mark.parametrize("family", STACKED)
def test_experts_are_stacked_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    """What is written of a model as it is, is what transformers has saved: the same tensors, bit by bit."""
    model, target = tiny_model(family, tmp_path / "model", tokenizer=False), tmp_path / "dense"
    spec, weights = spec_of(model), weights_of(model)
    lines = plan(spec)
    container = CONTAINERS["safetensors"]
    request = WriteRequest(target, spec, lines, fetcher(weights, lines), model, Options(dtype="f32"))
    (written,) = container.write(request)
    theirs, ours = load_file(model / "model.safetensors"), load_file(written)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    load = container.open_dense(target, spec)
    assert all(torch.equal(load(name), weights[name]) for name in (t.name for t in spec.tensors()))
    size = container.file_bytes([(line, 1) for line in lines], "f32", model)
    assert size == pytest.approx(written.stat().st_size, rel=1e-3)
