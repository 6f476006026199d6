"""Matrices solved as a stack, or as rows below each other under one gram, get the codes that each gets alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, stack
from compress.codecs.base import BlockCodec
from compress.errors import NumericalError
from compress.solvers import gptq
from compress.solvers.base import Solution, damped_stack
from compress.solvers.options import GptqOptions

B, M, N = 3, 16, 256
STACKING = (
    "int4-g128", "int3-g64-asym", "q2_k", "q4_k", "q8_0", "iq4_xs", "mxfp4", "tq2_0", "iq2_xxs", "iq2_s", "iq3_xxs", "iq1_m",
    "iq1_s", "e8p", "trellis2",
)  # fmt: skip


def problems(count: int = B, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [B, M, n] and grams [B, n, n] that differ in everything."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, M, n, generator=random) * torch.rand(count, 1, 1, generator=random) * 0.1
    mix = torch.randn(count, n, n, generator=random) / n**0.5 + 0.4 * torch.eye(n)
    x = (torch.randn(count, 700, n, generator=random) @ mix) * torch.exp(torch.randn(count, 1, n, generator=random))
    return weights, x.mT @ x / 700


def same(one: Solution, other: Solution) -> bool:
    grids = zip(one.grid.tensors().values(), other.grid.tensors().values(), strict=True)
    told = (one.error, one.damping, one.retries) == (other.error, other.damping, other.retries)
    return torch.equal(one.units, other.units) and all(torch.equal(a, b) for a, b in grids) and told


@pytest.mark.parametrize("name", STACKING)
def test_a_stack_gets_the_codes_of_each_alone(name: str) -> None:
    weights, grams = problems()
    codec, options = block_codec(name, N), GptqOptions()
    assert codec.stacks
    many = gptq.solve_alike(weights, grams, codec, options)
    alone = [gptq.solve(*each, codec, options) for each in zip(weights, grams, strict=True)]
    assert all(same(*pair) for pair in zip(many, alone, strict=True))
    assert not same(alone[0], alone[1])
    assert torch.equal(codec.unpack(many[1].pack()), many[1].decode())


@pytest.mark.parametrize("name", ["int4-g128", "q2_k", "iq2_xxs", "e8p", "trellis2"])
def test_rows_under_one_gram_get_the_codes_of_each_alone(name: str) -> None:
    weights, grams = problems()
    codec, options = block_codec(name, N), GptqOptions()
    whole = gptq.solve(weights.flatten(0, 1), grams[0], codec, options)
    alone = [gptq.solve(weight, grams[0], codec, options) for weight in weights]
    assert torch.equal(whole.units, torch.cat([each.units for each in alone]))
    assert torch.equal(whole.decode(), torch.cat([each.decode() for each in alone]))


def test_codecs_whose_numbers_are_shared_between_rows_do_not_stack() -> None:
    for name in ("nf4", "nf4-dq", "fp4-dq"):
        assert not block_codec(name, N).stacks
    assert BlockCodec.stacks is False, "codecs from outside say so themselves"


def test_each_matrix_of_a_stack_is_damped_by_itself() -> None:
    grams = problems()[1]
    grams[1] = -0.5 * torch.eye(N)  # cannot be factorised until the damping reaches its size
    grams[1].diagonal()[0] = 200.0
    damped = damped_stack(grams, 0.01, None)
    assert damped.retries[0] == damped.retries[2] == 0 and damped.retries[1] > 0
    assert damped.damping[0] == 0.01 and damped.damping[1] > 0.01
    for hessian, upper in zip(damped.hessian, damped.upper, strict=True):
        assert torch.allclose((upper.double().T @ upper.double()) @ hessian.double(), torch.eye(N).double(), atol=1e-4)
    grams[1].fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite"):
        damped_stack(grams, 0.01, None)


def test_columns_of_a_stack_are_ordered_by_their_own_energy() -> None:
    grams = torch.diag_embed(torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 1.0, 1.0, 5.0]]))
    order = damped_stack(grams, 0.01, 2).order
    assert order.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert damped_stack(grams, 0.01, 1).order.tolist() == [[1, 3, 2, 0], [0, 3, 1, 2]]


def test_products_of_stacks_are_those_of_their_parts() -> None:
    """Against einsum in double precision."""
    random = torch.Generator().manual_seed(1)
    grams, rows = torch.randn(4, 6, 5, generator=random), torch.randn(4 * 3, 6, generator=random)
    wanted = torch.einsum("brk,bkj->brj", rows.unflatten(0, (4, 3)).double(), grams.double()).flatten(0, 1)
    assert torch.allclose(stack.times(rows, grams).double(), wanted, atol=1e-5)
    columns = torch.randn(5, 12, generator=random)
    wanted = torch.einsum("bjk,kbr->jbr", grams.double(), columns.unflatten(1, (4, 3)).double()).flatten(1)
    assert torch.allclose(stack.before(grams, columns).double(), wanted, atol=1e-5)
    change, taken = torch.randn(6, 12, generator=random), columns.clone()
    stack.take_off(taken, grams, change)
    wanted = columns - torch.einsum("bkj,kbr->jbr", grams, change.unflatten(1, (4, 3))).flatten(1)
    assert torch.allclose(taken, wanted, atol=1e-5)
    error, metric = torch.randn(8, 2, 6, generator=random), torch.randn(4, 6, 6, generator=random)
    wanted = torch.einsum("nci,nij,ncj->nc", error, metric.repeat_interleave(2, 0), error)
    assert torch.allclose(stack.quadratic(error, metric), wanted, atol=1e-4)
