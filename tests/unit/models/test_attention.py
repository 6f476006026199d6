"""Options of attention against their formulas, written out entry by entry in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.models.forward.attention import Sight, attend, temperatures
from compress.models.forward.rope import rotate
from compress.models.layers.attention import Temperature

HEADS, KV_HEADS, LENGTH, WIDTH = 4, 2, 11, 6


def _tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"chunk": 4},
        {"scale": 0.7},
        {"softcap": 1.5},
        {"window": 3, "softcap": 1.5, "scale": 0.7},
        {"sinks": _tensor(9, HEADS)},
        {"sinks": _tensor(9, HEADS), "window": 3, "scale": 0.7},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_attention_is_its_formula(options: dict) -> None:
    q, k, v = (
        _tensor(1, 2, HEADS, LENGTH, WIDTH),
        _tensor(2, 2, KV_HEADS, LENGTH, WIDTH),
        _tensor(3, 2, KV_HEADS, LENGTH, WIDTH),
    )
    window, chunk = options.get("window", LENGTH), options.get("chunk", LENGTH)
    cap, sinks = options.get("softcap"), options.get("sinks")
    rest = {key: value for key, value in options.items() if key not in ("window", "chunk")}
    expected = np.zeros((2, LENGTH, HEADS, WIDTH))
    for b, h, i in np.ndindex(2, HEADS, LENGTH):
        seen = [j for j in range(i + 1) if i - j < window and i // chunk == j // chunk]
        keys, values = k[b, h // 2, seen].numpy(), v[b, h // 2, seen].numpy()
        scores = keys @ q[b, h, i].numpy() * options.get("scale", WIDTH**-0.5)
        weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        expected[b, i, h] = weights @ values / (weights.sum() + (np.exp(sinks[h].item()) if sinks is not None else 0))
    np.testing.assert_allclose(
        attend(q, k, v, Sight(options.get("window"), options.get("chunk")), **rest).numpy(),
        expected.reshape(2, LENGTH, -1),
        rtol=1e-10,
        atol=1e-12,
    )


def test_neighbours_turn_as_complex_numbers() -> None:
    """Channels 2 i and 2 i + 1 are the parts of a number that is multiplied by e^(i angle); the others stay."""
    x, angles = _tensor(1, 1, 2, 5, 8), _tensor(2, 5, 3)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    turned = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    expected = torch.cat((torch.view_as_real(turned).flatten(-2), x[..., 6:]), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved=True), expected)
    halves = [0, 2, 4, 1, 3, 5]
    torch.testing.assert_close(rotate(x[..., [*halves, 6, 7]], cos, sin), expected[..., [*halves, 6, 7]])


def test_temperatures_grow_by_the_logarithm_of_whole_runs() -> None:
    found = temperatures(Temperature(0.1, 4, 1), 12)
    expected = [1 + 0.1 * np.log(1 + (p + 1) // 4) for p in range(12)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
