"""What a linear is asked to make up for: what the residual stream lags, of a sub-layer that adds a part of what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.models.forward import Taps, forward_branch
from compress.plan.tensor import PlannedTensor
from compress.run.collect import Site, collect
from compress.solvers.options import GptqOptions
from compress.streaming.activations import Activations
from compress.streaming.walk import Streams
from tests.integration.containers import spec_of, weights_of
from tests.tiny import tiny_model


def _written(path: Path, values: torch.Tensor) -> Activations:
    activations = Activations(path, tuple(values.shape))
    with activations.writing() as out:
        out.append(values)
    return activations


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_lag_is_what_the_linear_would_have_to_give(factor: float, tmp_path: Path) -> None:
    model = tiny_model("granite", tmp_path / "model", tokenizer=False, residual_multiplier=factor)
    spec, weights = spec_of(model), {name: w.float() for name, w in weights_of(model).items()}
    branch = spec.branches(1)[0]
    tensor = next(t for t in branch.tensors if t.declared.alone)
    planned = PlannedTensor(tensor, "int4-g32", GptqOptions(residual=1.0), 0)
    random = torch.Generator().manual_seed(0)
    there, here = (torch.randn(2, 12, spec.hidden_size, generator=random) for _ in range(2))
    seen: dict[str, torch.Tensor] = {}
    forward_branch(branch, weights, here, Taps(lambda key, x, gate: seen.update({key: x})))
    streams = Streams(_written(tmp_path / "here", here), _written(tmp_path / "there", there))
    moments = collect(Site(branch, streams, weights, weights), 1, [planned])["attention.out"]
    expected = ((there - here) / factor).flatten(0, 1).T @ seen["attention.out"]
    torch.testing.assert_close(moments.residual, expected, rtol=1e-4, atol=1e-3)
