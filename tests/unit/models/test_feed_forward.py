"""Feed-forwards' options against formulas of their own: activations, tensors that checkpoints fuse, routing at the input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.models.checkpoint import Checkpoint
from compress.models.forward.base import Named, Routing, Taps
from compress.models.forward.mlp import activate, activations
from compress.models.forward.moe import choose, forward
from compress.models.layers.mlp import GELU_TANH, RELU2, SILU, Activation, FeedForward, Fused
from compress.models.layers.moe import MoE, Router, SharedExpert

CLAMPED = Activation(slope=1.702, limit=7.0, offset=1.0)
WIDTH, HIDDEN, EXPERTS = 6, 4, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (SILU, lambda g, u: g / (1 + torch.exp(-g)) * u),
        (GELU_TANH, lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u),
        (RELU2, lambda g, u: torch.where(g > 0, g * g, 0.0) * u),
        (CLAMPED, lambda g, u: (u.clip(-7, 7) + 1) * g.clip(None, 7) / (1 + torch.exp(-1.702 * g.clip(None, 7)))),
    ],
)
def test_activations(activation: Activation, expected: Any) -> None:
    gate, up = 9 * randn(50), 9 * randn(50, seed=1)
    torch.testing.assert_close(activate(activation, up, gate), expected(gate, up))
    torch.testing.assert_close(activate(RELU2, up), up.relu() ** 2)
    twice = activate(activation, 2 * up, gate)
    assert torch.allclose(twice, 2 * activate(activation, up, gate)) == activation.linear


def test_gate_and_up_in_one_tensor_and_a_gate_that_is_missing() -> None:
    x, both = randn(5, HIDDEN), randn(2 * WIDTH, HIDDEN, seed=1)
    joined = FeedForward("m.", WIDTH, "mlp", "ffn_{}", "mlp", joined="gate_up_proj")
    gate, up = (x @ both.T).split(WIDTH, dim=-1)
    weights = Named({"m.gate_up_proj.weight": both}, "")
    torch.testing.assert_close(activations(joined, weights, x), torch.nn.functional.silu(gate) * up)
    plain = FeedForward("m.", WIDTH, "mlp", "ffn_{}", "mlp", ("up_proj", "down_proj"), activation=RELU2)
    found = activations(plain, Named({"m.up_proj.weight": both[:WIDTH]}, ""), x)
    torch.testing.assert_close(found, (x @ both[:WIDTH].T).relu() ** 2)
    assert joined.made_by == plain.made_by == ()


def moe(**options: Any) -> MoE:
    router = options.pop("router", Router("gate.weight", 2))
    return MoE(
        HIDDEN, "norm", "ffn_norm", router=router, experts=EXPERTS, width=WIDTH, expert="experts.{e}.", **options
    )


@pytest.mark.parametrize("form", ["rows", "transposed", "interleaved", "up alone"])
def test_where_experts_lie_in_checkpoints_that_stack_them(form: str, tmp_path: Path) -> None:
    own = {
        (leaf, e): randn(*((HIDDEN, WIDTH) if leaf == "down_proj" else (WIDTH, HIDDEN)), seed=10 * e + n)
        for n, leaf in enumerate(("gate_proj", "up_proj", "down_proj"))
        for e in range(EXPERTS)
    }
    biases = {key: randn(len(weight), seed=99 + n) for n, (key, weight) in enumerate(own.items())}

    def stacked(table: dict[tuple[str, int], Tensor], leaf: str) -> Tensor:
        return torch.stack([table[leaf, e] for e in range(EXPERTS)])

    def both(table: dict[tuple[str, int], Tensor]) -> Tensor:
        gate, up = stacked(table, "gate_proj"), stacked(table, "up_proj")
        return torch.stack((gate, up), 2).flatten(1, 2) if form == "interleaved" else torch.cat((gate, up), 1)

    turned, gated = form in ("transposed", "interleaved"), form != "up alone"
    wide, down = both(own) if gated else stacked(own, "up_proj"), stacked(own, "down_proj")
    held = {"both": wide.mT if turned else wide, "down": down.mT if turned else down}
    fused = Fused("both", "down", turned, form == "interleaved", ("both_bias", "down_bias") if gated else None)
    if gated:
        held |= {"both_bias": both(biases), "down_bias": stacked(biases, "down_proj")}
    save_file({n: w.contiguous() for n, w in held.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    checkpoint, leaves = Checkpoint.open(tmp_path), ("gate_proj", "up_proj", "down_proj")
    layer = moe(fused=fused, bias=gated, leaves=leaves if gated else leaves[1:])
    seen = 0
    for weight in layer.weights:
        if weight.expert is None:
            continue
        (where,), leaf = weight.slices, weight.name.split(".")[2]
        found = read(checkpoint, where)
        assert torch.equal(found, (biases if weight.role == "biases" else own)[leaf, weight.expert]), weight.name
        assert found.shape == weight.shape
        seen += 1
    assert seen == EXPERTS * (6 if gated else 2)


def read(checkpoint: Checkpoint, where: Any) -> Tensor:
    from dataclasses import replace

    entry = replace(checkpoint.entries[where.name], part=where)
    with entry.opened() as file:
        return entry.read(where.name, file)


def test_a_bias_of_the_router_and_a_row_of_corrections() -> None:
    router = Router("gate.wg.weight", 1, "sigmoid", bias=True, correction="statics", correction_row=True)
    layer = moe(router=router)
    shapes = {w.name: w.shape for w in layer.weights}
    assert (shapes["gate.wg.bias"], shapes["statics"]) == ((EXPERTS,), (1, EXPERTS))
    weights = Named({"gate.wg.weight": torch.zeros(EXPERTS, HIDDEN), "gate.wg.bias": torch.tensor([2.0, 1.0, 0.0]),
                     "statics": torch.tensor([[-1.0, 0.0, 0.0]])}, "")  # fmt: skip
    found = choose(layer, weights, randn(7, HIDDEN))
    assert (found.experts == 1).all() and (found.weights == 1).all()


def test_routing_weights_at_the_input() -> None:
    """An expert reads its tokens times their weights; what it gives is added as it is."""
    layer = moe(
        router=Router("gate.weight", 1, "sigmoid", normalised=False, at_input=True), shared=SharedExpert("s.", 5)
    )
    weights = {w.name: randn(*w.shape, seed=n) for n, w in enumerate(layer.weights)}
    x, seen = randn(1, 9, HIDDEN, seed=77), {}

    class Place:
        sublayer = layer

    def note(key: str, rows: Tensor, gate: Tensor | None) -> None:
        seen[key] = rows, gate

    def expert(prefix: str, rows: Tensor) -> Tensor:
        gate, up, down = (weights[f"{prefix}{leaf}_proj.weight"] for leaf in ("gate", "up", "down"))
        return (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T

    out = forward(Place, Named(weights, ""), x, Taps(note))  # type: ignore[arg-type]
    rows, logits = x[0], x[0] @ weights["gate.weight"].T
    best = logits.argmax(-1)
    expected = torch.stack(
        [
            expert(f"experts.{e}.", row * logits[n, e].sigmoid())
            for n, (e, row) in enumerate(zip(best, rows, strict=True))
        ]
    )
    torch.testing.assert_close(out[0], expected + expert("s.", rows))
    for e in best.unique().tolist():
        (inside, weight), (_, after) = seen[f"experts.{e}.in"], seen[f"experts.{e}.act"]
        assert torch.equal(inside, rows[best == e]) and torch.equal(weight, logits[best == e, e].sigmoid())
        assert (after == 1).all()
    given = Routing(torch.zeros(9, 1, dtype=torch.int64), torch.full((9, 1), 0.5))
    half = forward(Place, Named(weights, ""), x, Taps(routing=given))  # type: ignore[arg-type]
    torch.testing.assert_close(half[0], expert("experts.0.", 0.5 * rows) + expert("s.", rows))
    assert not layer.sums_to_one
