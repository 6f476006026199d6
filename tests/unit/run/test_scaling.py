"""Scalings of a sub-layer: it computes what it did, whatever memory statistics may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.models.forward import forward_branch
from compress.plan.tensor import PlannedTensor
from compress.run import scaling
from compress.solvers.options import RtnOptions
from compress.streaming.activations import Activations
from compress.streaming.walk import Streams
from compress.transforms.options import AwqOptions, SmoothOptions
from tests.integration.containers import spec_of, weights_of
from tests.tiny import tiny_model

LAYER, WINDOWS, LENGTH = 1, 4, 32


def streams_of(folder: Path, width: int) -> Streams:
    """Activations with a few loud channels."""
    activations = Activations(folder / "activations.f32", (WINDOWS, LENGTH, width))
    loud = torch.ones(width)
    loud[::7] = 12.0
    with activations.writing() as out:
        out.append(torch.randn(WINDOWS, LENGTH, width, generator=torch.Generator().manual_seed(0)) * loud)
    return Streams(activations, None)


def test_moments_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of statistics at a time gives the scales that all at once give."""
    model = tiny_model("qwen3_moe", tmp_path / "model")
    spec, weights = spec_of(model), {name: w.float() for name, w in weights_of(model).items()}
    branch = spec.branches(LAYER)[1]
    tensors = branch.tensors
    coded = {t.name for t in tensors if t.role.startswith("routed_experts")}
    block = [
        PlannedTensor(t, "int4-g32" if t.name in coded else "f32", RtnOptions() if t.name in coded else None, 0)
        for t in tensors
    ]
    before = {t.name: weights[t.name] for t in tensors}
    streams = streams_of(tmp_path, spec.hidden_size)
    transforms = (AwqOptions(grid=4), SmoothOptions())
    held: list[int] = []
    observe = scaling._observe

    def counted(*arguments: object) -> object:
        held.append(len(arguments[3]))  # type: ignore[arg-type]
        return observe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scaling, "_observe", counted)
    whole, folded = scaling.scale_sublayer(branch, block, before, streams, transforms)
    assert held == [1 + spec.experts, 1] and len(folded) == 2 + spec.experts
    assert all(fold.after <= fold.before for fold in folded if fold.transform == "awq")
    assert not all(torch.equal(whole[name], before[name]) for name in coded)

    x = streams.compressed.read(0, WINDOWS)
    reference = forward_branch(branch, before, x)
    torch.testing.assert_close(forward_branch(branch, whole, x), reference, rtol=1e-4, atol=1e-4)

    held.clear()
    monkeypatch.setattr(scaling, "MOMENTS_BYTES", 2 * 4 * 32**2)  # two experts' inputs of width 32
    parts, again = scaling.scale_sublayer(branch, block, before, streams, transforms)
    assert held == [1, *[2] * (spec.experts // 2), 1]
    assert [fold.input for fold in again] == [fold.input for fold in folded]
    for name in before:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)
