"""One tensor pruned or factorised in the codecs of its numbers: what ships, and that chains serve the weight, not each other."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, get_codec
from compress.codecs.factors import join, split
from compress.codecs.names import packed_bytes
from compress.containers import CONTAINERS
from compress.containers.compress import Setting, packed_of, stored_parts
from compress.decode import decode
from compress.models.spec import TensorSpec
from compress.plan.tensor import PlannedTensor, factored, pruned
from compress.runtime.factored import FactoredLinear
from compress.solve.shrunk import factorize_tensor, prune_tensor
from compress.solve.tensor import solve_tensor
from compress.solvers import compot, rtn
from compress.solvers.options import (
    CompotOptions,
    GptqOptions,
    RocketOptions,
    RtnOptions,
    SparseGptOptions,
    SvdOptions,
    WandaOptions,
)
from compress.statistics import Statistics
from compress.weights import Pattern

M, N = 96, 128


def planned(codec: str, solver: object = None, shape: tuple[int, int] = (M, N)) -> PlannedTensor:
    spec = TensorSpec("model.layers.0.mlp.up_proj.weight", shape, "mlp.up", 0, None, "blk.0.ffn_up.weight", "mlp.in")
    return PlannedTensor(spec, codec, solver, 0, values=codec)  # type: ignore[arg-type]


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, N, generator=random) / N**0.5 + 0.4 * torch.eye(N)
    x = (torch.randn(2000, N, generator=random) @ mix) * torch.exp(0.7 * torch.randn(N, generator=random))
    return 0.05 * torch.randn(M, N, generator=random), x.T @ x / 2000


def loss(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """In float64, from the definition."""
    gap, gram = (weight - dense).double(), gram.double()
    return float(((gap @ gram) * gap).sum() / ((weight.double() @ gram) * weight.double()).sum())


def prune(
    values: str, pattern: Pattern, options: object, solver: object = None, joint: bool = True, containers=("compress",)
):
    line = replace(planned(values, solver), pruner=options, joint=joint)  # type: ignore[arg-type]
    return pruned(line, pattern, [CONTAINERS[name] for name in containers])


def factorize(values: str, options: object, share: float, solver: object = None) -> PlannedTensor:
    return factored(replace(planned(values, solver), factorizer=options), share)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", ["bf16", "int4-g64", "int3-row-asym"])
@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern.n_of_m(2, 4)], ids=str)
def test_pruned_tensors_ship_what_was_solved(values: str, pattern: Pattern) -> None:
    weight, gram = problem()
    line = prune(values, pattern, SparseGptOptions(), None if values == "bf16" else GptqOptions())
    shrunk = prune_tensor(line, weight, gram)
    assert torch.equal(decode(shrunk.packed), shrunk.dense)
    assert int((shrunk.dense != 0).sum()) <= pattern.kept(M, N)
    size = sum(p.numel() * p.element_size() for p in shrunk.packed.parts.values())
    assert size == packed_bytes(line.codec, (M, N), line.kept)
    assert shrunk.error == pytest.approx(loss(weight, shrunk.dense, gram), rel=1e-3)


def test_zeros_in_a_container_without_masks_are_values_like_others() -> None:
    weight, gram = problem()
    line = prune("bf16", Pattern(0.5), WandaOptions(), containers=("gguf", "compress"))
    assert line.codec == "bf16"
    shrunk = prune_tensor(line, weight, gram)
    assert shrunk.packed.codec == "bf16" and int((shrunk.dense == 0).sum()) == M * N // 2


def test_codes_that_make_up_for_a_mask_beat_codes_of_what_it_left() -> None:
    for seed in range(3):
        weight, gram = problem(seed)
        for options in (WandaOptions(), SparseGptOptions()):
            both = [
                prune_tensor(prune("int4-g64", Pattern(0.5), options, GptqOptions(), joint), weight, gram).error
                for joint in (True, False)
            ]
            assert both[0] < both[1]


@pytest.mark.parametrize("options", [SparseGptOptions(), WandaOptions()], ids=lambda o: o.name)
def test_plain_rounding_rounds_what_the_pruner_left(options: object) -> None:
    """It cannot make up for a mask, so that it must not undo what the pruner did: rounding adds little to its loss."""
    weight, gram = problem()
    floats = prune_tensor(prune("f32", Pattern(0.5), options), weight, gram).error
    rounded = prune_tensor(prune("int8-g64", Pattern(0.5), options, RtnOptions()), weight, gram).error
    assert floats < rounded < 1.02 * floats


def test_rounded_factors_are_no_worse_than_their_own_coefficients_rounded() -> None:
    weight, gram = problem()
    for factorizer in (CompotOptions(), RocketOptions()):
        line = factorize("int8-g64", factorizer, 0.8, RtnOptions())
        module = import_module(f"compress.solvers.{factorizer.name}")
        factors = module.factorize(weight, gram, *line.factors, factorizer)
        atoms = rtn.solve(factors.dictionary, gram, block_codec("int8-g64", N), RtnOptions()).decode()
        seen = atoms @ gram @ atoms.T
        rows = rtn.solve(
            factors.coefficients, seen, block_codec("int8-row", line.factors[0]), RtnOptions(), mask=factors.mask
        )
        plain = loss(weight, rows.decode() @ atoms, gram)
        assert factorize_tensor(line, weight, gram).error <= 1.001 * plain


def test_raised_damping_is_told() -> None:
    weight, _ = problem()
    x = torch.randn(8, N, generator=torch.Generator().manual_seed(3))
    gram = x.T @ x / 8
    for line, run in (
        (prune("f32", Pattern(0.5), SparseGptOptions(damping=1e-16)), prune_tensor),
        (factorize("f32", CompotOptions(damping=1e-16), 0.7), factorize_tensor),
    ):
        shrunk = run(line, weight, gram)
        assert shrunk.retries > 0 and shrunk.damping > 1e-16


@pytest.mark.parametrize("options", [SvdOptions(), CompotOptions()], ids=lambda o: o.name)
@pytest.mark.parametrize("values", ["bf16", "int8-g64", "int4-g64"])
def test_factors_ship_what_was_solved(values: str, options: object) -> None:
    weight, gram = problem()
    line = factorize(values, options, 0.7, None if values == "bf16" else GptqOptions())
    shrunk = factorize_tensor(line, weight, gram)
    assert torch.equal(decode(shrunk.packed), shrunk.dense)
    parts = stored_parts(shrunk.packed)
    assert sum(p.numel() * p.element_size() for p in parts.values()) == packed_bytes(
        line.codec, (M, N), line.kept, line.factors[0]
    )
    again = packed_of(line.codec, (M, N), parts)
    assert torch.equal(decode(again), shrunk.dense)
    layer = FactoredLinear(Setting(line.codec), (M, N), parts)
    x = torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ shrunk.dense.T, rtol=1e-4, atol=1e-5)
    assert shrunk.error == pytest.approx(loss(weight, shrunk.dense, gram), rel=1e-3)


def test_coefficients_are_solved_for_the_dictionary_that_ships() -> None:
    """What rounding adds to the loss of the factors, against rounding both as they are by the same codecs."""
    weight, gram = problem()
    line = factorize("int4-g64", CompotOptions(), 0.7, GptqOptions())
    factors = compot.factorize(weight, gram, *line.factors, CompotOptions())
    exact = loss(weight, factors.dense(), gram)
    k = line.factors[0]
    atoms = rtn.solve(factors.dictionary, gram, block_codec("int4-g64", N), RtnOptions()).decode()
    rows = rtn.solve(factors.coefficients, None, block_codec("int4-row", k), RtnOptions(), mask=factors.mask).decode()
    plain = loss(weight, rows @ atoms, gram)
    solved = factorize_tensor(line, weight, gram).error
    assert exact < solved < exact + 0.5 * (plain - exact)


def test_split_undoes_join() -> None:
    weight, gram = problem()
    packed = factorize_tensor(factorize("bf16", CompotOptions(), 0.6), weight, gram).packed
    first, second = split(packed.codec, packed.shape, packed.parts)
    assert join(packed.codec, packed.shape, first.parts, second.parts).parts.keys() == packed.parts.keys()
    dense = get_codec(second.codec).unpack(second) @ get_codec(first.codec).unpack(first)
    assert torch.equal(dense, decode(packed))


def test_drift_moves_the_target_of_pruners_that_ask_for_it() -> None:
    """sparsegpt approximates what makes up for drifted inputs, wanda the weight itself."""
    weight, gram = problem()
    drift = 0.3 * gram
    target = weight @ (torch.eye(N) + 0.3 * torch.eye(N))  # W + W D G^-1, the ridge apart
    statistics = Statistics(gram, drift, None, 2000)
    moved = solve_tensor(prune("f32", Pattern(0.3), SparseGptOptions(drift_damping=1e-9)), weight, statistics).dense()
    assert loss(target, moved, gram) < loss(weight, moved, gram)
    still = solve_tensor(prune("f32", Pattern(0.3), WandaOptions()), weight, statistics).dense()
    kept = still != 0
    assert torch.equal(still[kept], weight[kept])
