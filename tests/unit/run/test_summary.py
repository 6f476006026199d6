"""Errors per layer and role against the outputs themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compress.run.summary import layer_errors
from compress.solvers.base import energy, relative_error
from compress.statistics import Moments, blend


def plan_of(*tensors: tuple[str, int | None, str, int]) -> SimpleNamespace:
    """name, layer, role, parameters."""
    planned = [
        SimpleNamespace(name=name, spec=SimpleNamespace(layer=layer, role=role, parameters=parameters))
        for name, layer, role, parameters in tensors
    ]
    return SimpleNamespace(tensors=planned, by_name={t.name: t for t in planned})


def test_experts_count_by_their_outputs() -> None:
    """Three experts, of which one saw no token; against sums of squares of gated outputs, in float64."""
    torch.manual_seed(0)
    lost = whole = 0.0
    solved = []
    for expert, tokens in enumerate((40, 7, 0)):
        weight, rounded = torch.randn(6, 8), torch.randn(6, 8)
        x, gate = torch.randn(tokens, 8) * (expert + 1), torch.rand(tokens)
        own, pool = Moments.zeros(8), Moments.zeros(8)
        own.add(x, gate=gate)
        pool.add(torch.randn(20, 8))
        statistics = blend(own, pool if tokens == 0 else None, 1.0)
        error = relative_error(weight, rounded, statistics.gram)
        total = energy(weight, statistics.gram) * statistics.weight
        solved.append({"name": f"e{expert}", "codec": "q4_k" if expert else "q8_0", "error": error, "energy": total})
        scaled = (x * gate[:, None]).double()
        lost += float(((scaled @ (weight - rounded).double().T) ** 2).sum())
        whole += float(((scaled @ weight.double().T) ** 2).sum())
    plan = plan_of(*((f"e{expert}", 3, "routed_experts.up", 48) for expert in range(3)))
    (found,) = layer_errors(plan, solved)
    assert found.error == pytest.approx(lost / whole, rel=1e-4)
    assert (found.layer, found.role, found.codec, found.parameters) == (3, "routed_experts.up", "q4_k", 144)


def test_one_line_a_layer_and_role_in_the_order_of_the_plan() -> None:
    plan = plan_of(
        ("embed", None, "embeddings", 9),
        ("q0", 0, "attention.q", 4),
        ("k0", 0, "attention.k", 4),
        ("q1", 1, "attention.q", 4),
    )
    solved = [{"name": name, "codec": "q8_0", "error": 0.5, "energy": 0.0} for name in ("q1", "embed", "k0", "q0")]
    found = [(e.layer, e.role, e.error) for e in layer_errors(plan, solved)]
    assert found == [
        (None, "embeddings", 0.5),
        (0, "attention.q", 0.5),
        (0, "attention.k", 0.5),
        (1, "attention.q", 0.5),
    ]


def test_energy_of_weights_of_any_size() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64)
    gram = torch.eye(8) * 3
    wanted = float((weight**2).sum()) * 3
    for scale in (1.0, 1e-25, 1e25):
        assert energy((weight * scale).float(), gram) == pytest.approx(wanted * scale**2, rel=1e-4)
    assert energy(weight.float(), None) == pytest.approx(wanted / 3, rel=1e-4)
