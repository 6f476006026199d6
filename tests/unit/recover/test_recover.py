"""Recovery against closed forms, and its promises: never worse, exactly what is stored, the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, get_codec
from compress.codecs.scales import half
from compress.decode import decode
from compress.models.checkpoint import Checkpoint
from compress.models.forward import Taps, forward_block, forward_branch, rms_norm
from compress.models.spec import ModelSpec, load_spec
from compress.plan import make_plan
from compress.recipe import load_recipe
from compress.recover.block import Recovered, SolvedBlock, recover_block
from compress.recover.parameters import nearest_units
from compress.recover.sensitivity import output_sensitivity
from compress.report.progress import Reporter
from compress.run import compress_model
from compress.solve.tensor import Outcome, Solved
from compress.solvers import rtn
from compress.solvers.options import RecoverOptions, RtnOptions
from compress.streaming.activations import Activations
from compress.streaming.journal import Journal
from compress.streaming.placement import CPU
from compress.streaming.walk import BlockAt
from compress.transforms.incoherence import Incoherence
from tests.integration.runs import without_times
from tests.tiny import tiny_model

WINDOWS, LENGTH = 8, 24
FINE = ["q8_0", "q2_k", "iq2_xxs", "q5_1", "q4_0", "int4-g32", "int4-g32-asym", "nf4", "nf4-dq", "mxfp4", "e8p"]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Mapping[str, Tensor], Checkpoint]:
    """A tiny mixture of experts: its spec, and float32 weights by name."""
    folder = tiny_model("qwen3_moe", tmp_path_factory.mktemp("model"), tokenizer=False)
    spec, checkpoint = load_spec(json.loads((folder / "config.json").read_text())), Checkpoint.open(folder)
    return spec, {t.name: checkpoint.load(t.name).float() for t in spec.tensors()}, checkpoint


def _stream(path: Path, values: Tensor) -> Activations:
    stream = Activations(path, tuple(values.shape))
    with stream.writing() as out:
        out.append(values)
    return stream


def _outcome(name: str, weight: Tensor, codec: str, incoherence: Incoherence | None = None) -> Outcome:
    turned = weight if incoherence is None else incoherence.weight(weight)
    solution = rtn.solve(turned, None, block_codec(codec, weight.shape[1]), RtnOptions())
    return Outcome(solution, incoherence, Solved(name, codec, "rtn", solution.error))


def _block(
    spec: ModelSpec, weights: Mapping[str, Tensor], codec: str = "q4_0", layer: int = 0
) -> tuple[dict[str, Outcome], dict[str, Tensor]]:
    """Block 0 with every matrix but the router at `codec`, the rest in f32."""
    outcomes, floats = {}, {}
    for t in spec.block_tensors(layer):
        if len(t.shape) == 2 and t.role != "router":
            outcomes[t.name] = _outcome(t.name, weights[t.name], codec)
        else:
            floats[t.name] = weights[t.name].clone()
    return outcomes, floats


def _recover(
    spec: ModelSpec,
    outcomes: Mapping[str, Outcome],
    floats: Mapping[str, Tensor],
    streams: tuple[Activations, Activations],
    options: RecoverOptions,
    *,
    stored: str = "f32",
    metric: Tensor | None = None,
) -> Recovered:
    with torch.inference_mode():  # as in a run
        block = BlockAt(spec, 0, _nothing, CPU)
        solved = SolvedBlock(block, outcomes, floats, dict.fromkeys(floats, stored))
        return recover_block(solved, *streams, options, metric=metric)


def _nothing(name: str) -> Tensor:
    """A solved block brings its own tensors."""
    raise AssertionError(f"{name} was loaded")


def _error(
    spec: ModelSpec, dense: Mapping[str, Tensor], inputs: Tensor, wanted: Tensor, metric: Tensor | None = None
) -> float:
    """Relative error on the last window, the only one that is held out."""
    missed, total = (forward_block(spec, 0, dense, inputs[-1:]) - wanted[-1:])[0].double(), wanted[-1].double()
    weigh = torch.eye(spec.hidden_size).double() if metric is None else metric.double()
    return float(((missed @ weigh) * missed).sum() / ((total @ weigh) * total).sum())


# -- what is stored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINE)
def test_rescaled_grids_are_what_the_bytes_decode_to(name: str) -> None:
    codec = block_codec(name, 256)
    solution = rtn.solve(_randn(6, 256), None, codec, RtnOptions())
    grid = solution.grid
    stored, *offsets = grid.reals
    factor, offset_factor = 1 + 0.05 * _randn(*stored.shape, seed=1), 1 + 0.05 * _randn(*stored.shape, seed=2)
    moved = codec.rescaled(grid, factor, offset_factor if offsets else None)
    assert torch.equal(get_codec(name).unpack(codec.pack(solution.units, moved)), codec.decode(solution.units, moved))
    if name not in ("nf4", "nf4-dq", "mxfp4"):  # scales that are no half-precision numbers
        assert torch.equal(moved.reals[0], half(stored * factor))
    if offsets:
        assert torch.equal(moved.dmin, half(grid.dmin * offset_factor))
        assert torch.equal(codec.rescaled(grid, factor).offset, grid.offset)
    for integers in ("integers", "min_integers", "zero"):
        if hasattr(grid, integers):
            assert torch.equal(getattr(moved, integers), getattr(grid, integers))
    tolerance = {"nf4-dq": 0.01, "mxfp4": 0.5}.get(name, 1e-3)
    torch.testing.assert_close(moved.scale / grid.scale, _wide(factor, grid.scale), rtol=tolerance, atol=tolerance)


def _wide(factor: Tensor, like: Tensor) -> Tensor:
    return factor.repeat_interleave(like.shape[1] // factor.shape[1], dim=1)


def test_finely_stored_weights_round_to_their_own_scales() -> None:
    """Brute force over all 256 codes."""
    solution = rtn.solve(_randn(3, 64), None, block_codec("q8_0", 64), RtnOptions())
    wanted = solution.decode() + 0.01 * _randn(3, 64, seed=1)
    values = torch.arange(-127, 128) * solution.codec.columns(solution.grid.scale)[..., None]
    nearest = values.gather(2, (values - wanted[..., None]).abs().argmin(2, keepdim=True))[..., 0]
    assert torch.equal(solution.codec.decode(nearest_units(solution, wanted), solution.grid), nearest)


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_a_wrong_norm_comes_back(model: tuple, tmp_path: Path) -> None:
    """The block is exact but for one norm: the closed form is the original's norm, with an error of zero."""
    spec, weights, _ = model
    outcomes, floats = _block(spec, weights, "q8_0")
    inputs = _randn(64, LENGTH, spec.hidden_size)
    exact = floats | {name: o.solution.decode() for name, o in outcomes.items()}
    wanted = forward_block(spec, 0, exact, inputs)
    name = "model.layers.0.post_attention_layernorm.weight"
    wrong = floats | {name: floats[name] * (1 + 0.1 * _randn(spec.hidden_size, seed=3))}
    streams = _stream(tmp_path / "in", inputs), _stream(tmp_path / "out", wanted)
    options = RecoverOptions(tune=("norms",), epochs=120, lr_floats=0.01, patience=120)
    recovered = _recover(spec, outcomes, wrong, streams, options)
    assert recovered.kept and recovered.after < 1e-3 * recovered.before
    off = (wrong[name] - floats[name]).abs().mean()
    assert (recovered.floats[name] - floats[name]).abs().mean() < 0.05 * off


def test_wrong_scales_come_back_to_least_squares(model: tuple, tmp_path: Path) -> None:
    """o_proj is linear in its scales: the normal equations of every output row are the oracle."""
    spec, weights, _ = model
    name = "model.layers.0.self_attn.o_proj.weight"
    inputs = _randn(32, LENGTH, spec.hidden_size)
    right = _outcome(name, weights[name], "q4_0")
    solution = right.solution
    floats = {t.name: weights[t.name] for t in spec.block_tensors(0) if t.name != name}
    floats |= {n: torch.zeros_like(v) for n, v in floats.items() if "down_proj" in n}  # the block is its attention
    dense = floats | {name: solution.decode()}
    wanted = forward_block(spec, 0, dense, inputs) + 0.01 * _randn(32, LENGTH, spec.hidden_size, seed=5)
    wrong = solution.codec.rescaled(solution.grid, 1 + 0.1 * _randn(*solution.grid.scale.shape, seed=4))
    planted = {name: replace(right, solution=replace(solution, grid=wrong))}
    streams = _stream(tmp_path / "in", inputs), _stream(tmp_path / "out", wanted)
    options = RecoverOptions(tune=("scales",), epochs=80, lr_scales=0.01, patience=80, held_out=0.05)
    recovered = _recover(spec, planted, floats, streams, options)
    # least squares on the same windows, per row: y = sum_j s_j (u_j . x_j)
    seen: list[Tensor] = []
    taps = Taps(lambda k, x, g: seen.append(x) if k.endswith("out") else None)
    forward_branch(spec.branches(0)[0], dense, inputs[:-2], taps)
    x, residual = seen[0].double(), (wanted - inputs)[:-2].reshape(-1, spec.hidden_size).double()
    u = solution.units.double().reshape(len(solution.units), -1, solution.codec.sub)
    found = recovered.outcomes[name].solution.grid.scale.double()
    for row in range(0, spec.hidden_size, 7):
        design = torch.einsum("tjs,js->tj", x.reshape(len(x), -1, solution.codec.sub), u[row])
        best = torch.linalg.lstsq(design, residual[:, row, None]).solution[:, 0]
        assert (found[row] - best).norm() < 0.15 * (wrong.scale[row].double() - best).norm()


# -- promises ----------------------------------------------------------------------------------------------------------


@pytest.fixture()
def case(model: tuple, tmp_path: Path) -> tuple[ModelSpec, dict, dict, tuple[Activations, Activations], Tensor, Tensor]:
    """Block 0 at 4 bits, on inputs that differ a little between the two models."""
    spec, weights, _ = model
    outcomes, floats = _block(spec, weights)
    reference = _randn(WINDOWS, LENGTH, spec.hidden_size)
    wanted = forward_block(spec, 0, weights, reference)
    inputs = reference + 0.05 * _randn(*reference.shape, seed=9)
    streams = _stream(tmp_path / "in", inputs), _stream(tmp_path / "out", wanted)
    return spec, outcomes, floats, streams, inputs, wanted


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("stored", ["f32", "bf16"])
def test_reported_errors_are_those_of_the_bytes(case: tuple, weighted: bool, stored: str) -> None:
    spec, outcomes, floats, streams, inputs, wanted = case
    mix = _randn(spec.hidden_size, spec.hidden_size, seed=6)
    metric = mix @ mix.T if weighted else None
    float_codec = get_codec(stored)
    floats = {name: float_codec.unpack(float_codec.encode(v)) for name, v in floats.items()}
    recovered = _recover(spec, outcomes, floats, streams, RecoverOptions(), stored=stored, metric=metric)
    assert recovered.kept and recovered.after < recovered.before
    for tensors, values, told in (
        (outcomes, floats, recovered.before),
        (recovered.outcomes, recovered.floats, recovered.after),
    ):
        shipped = {n: decode(o.pack()) for n, o in tensors.items()}
        shipped |= {n: float_codec.unpack(float_codec.encode(v)) for n, v in values.items()}
        assert told == pytest.approx(_error(spec, shipped, inputs, wanted, metric), rel=1e-4)
    assert any(not torch.equal(recovered.floats[n], floats[n]) for n in floats)
    for name, outcome in recovered.outcomes.items():
        assert torch.equal(outcome.solution.units, outcomes[name].solution.units)
        assert not torch.equal(outcome.solution.grid.scale, outcomes[name].solution.grid.scale)


def test_a_block_that_gets_worse_is_left_alone(case: tuple) -> None:
    spec, outcomes, floats, streams, _, _ = case
    bad = RecoverOptions(lr_floats=5.0, lr_scales=5.0, lr_codes=5.0)
    recovered = _recover(spec, outcomes, floats, streams, bad)
    assert not recovered.kept and recovered.reason and recovered.after >= recovered.before
    assert recovered.report["kept"] is False
    assert all(recovered.outcomes[n] is outcomes[n] for n in outcomes)
    assert all(recovered.floats[n] is floats[n] for n in floats)


def test_only_what_is_named_moves(case: tuple) -> None:
    spec, outcomes, floats, streams, _, _ = case
    recovered = _recover(spec, outcomes, floats, streams, RecoverOptions(tune=("router",)))
    moved = {n for n in floats if not torch.equal(recovered.floats[n], floats[n])}
    assert moved == {"model.layers.0.mlp.gate.weight"}
    for name in outcomes:
        assert torch.equal(recovered.outcomes[name].solution.decode(), outcomes[name].solution.decode())


def test_the_same_seed_gives_the_same_bytes(case: tuple) -> None:
    spec, outcomes, floats, streams, _, _ = case
    one, two = (_recover(spec, outcomes, floats, streams, RecoverOptions()) for _ in range(2))
    assert (one.before, one.after) == (two.before, two.after)
    for name in outcomes:
        first, second = one.outcomes[name].pack().parts, two.outcomes[name].pack().parts
        assert all(torch.equal(first[part], second[part]) for part in first)


def test_fine_codes_make_up_for_a_wrong_norm(model: tuple, tmp_path: Path) -> None:
    spec, weights, _ = model
    outcomes, floats = _block(spec, weights, "q8_0")
    inputs = _randn(32, LENGTH, spec.hidden_size)
    wanted = forward_block(spec, 0, weights, inputs)
    name = "model.layers.0.input_layernorm.weight"
    floats[name] = floats[name] * (1 + 0.1 * _randn(spec.hidden_size, seed=3))
    streams = _stream(tmp_path / "in", inputs), _stream(tmp_path / "out", wanted)
    recovered = _recover(spec, outcomes, floats, streams, RecoverOptions(tune=("codes",), epochs=40, patience=40))
    assert recovered.kept and recovered.after < 0.9 * recovered.before
    for tensor, outcome in recovered.outcomes.items():
        assert torch.equal(outcome.solution.grid.scale, outcomes[tensor].solution.grid.scale)
        assert torch.equal(outcome.solution.units, outcome.solution.units.round().clamp(-127, 127))
    assert torch.equal(recovered.floats[name], floats[name])


def test_one_window_cannot_be_held_out(case: tuple, tmp_path: Path) -> None:
    spec, outcomes, floats, _, inputs, wanted = case
    streams = _stream(tmp_path / "one", inputs[:1]), _stream(tmp_path / "two", wanted[:1])
    recovered = _recover(spec, outcomes, floats, streams, RecoverOptions())
    assert not recovered.kept and "hold" in recovered.reason


def test_incoherent_tensors_keep_their_space(case: tuple, model: tuple) -> None:
    """A tensor coded between Hadamard transforms: its row scales are tuned through them."""
    spec, outcomes, floats, streams, inputs, wanted = case
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = model[1][name]
    with torch.inference_mode():
        outcomes = outcomes | {name: _outcome(name, weight, "int8-row", Incoherence.draw(*weight.shape, 1, 2))}
    recovered = _recover(spec, outcomes, floats, streams, RecoverOptions(tune=("scales",)))
    assert recovered.kept
    shipped = {n: decode(o.pack()) for n, o in recovered.outcomes.items()} | dict(recovered.floats)
    assert recovered.after == pytest.approx(_error(spec, shipped, inputs, wanted), rel=1e-4)
    assert not torch.equal(recovered.outcomes[name].solution.grid.scale, outcomes[name].solution.grid.scale)


# -- sensitivity -------------------------------------------------------------------------------------------------------


def test_sensitivity_predicts_the_divergence_of_small_errors(model: tuple, tmp_path: Path) -> None:
    """KL(original || perturbed) is e^T E[g g^T] e / 2 for a small error e that is the same at every token of the last
    block's output; there the outer products can also be summed in closed form, over all next tokens."""
    spec, weights, checkpoint = model
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (24, 32)).astype(np.int32)
    with torch.inference_mode():
        metrics = output_sensitivity(spec, checkpoint.load, ids, lambda n: Activations(tmp_path / n, (24, 32, 64)))
    assert len(metrics) == spec.layers and not list(tmp_path.glob("survey*"))
    hidden = weights["model.embed_tokens.weight"][torch.from_numpy(ids).long()]
    for layer in range(spec.layers):
        hidden = forward_block(spec, layer, weights, hidden)

    def log_probabilities(states: Tensor) -> Tensor:
        return (
            rms_norm(states, weights["model.norm.weight"], spec.norm_eps) @ weights["lm_head.weight"].T
        ).log_softmax(-1)

    reference = log_probabilities(hidden).double()
    told, measured = [], []
    for seed in range(6):
        e = 0.02 * _randn(spec.hidden_size, seed=seed)
        shifted = log_probabilities(hidden + e).double()
        measured.append(float((reference.exp() * (reference - shifted)).sum(-1).mean()))
        told.append(float(e @ metrics[-1] @ e) / 2)
    assert np.mean(told) == pytest.approx(np.mean(measured), rel=0.15)


def test_sensitivity_reaches_the_first_block(model: tuple, tmp_path: Path) -> None:
    """The chain through a block, against the gradient of the whole model in one graph."""
    spec, weights, checkpoint = model
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 16)).astype(np.int32)
    metrics = output_sensitivity(spec, checkpoint.load, ids, lambda n: Activations(tmp_path / n, (2, 16, 64)), seed=3)
    first = forward_block(spec, 0, weights, weights["model.embed_tokens.weight"][torch.from_numpy(ids).long()])
    first.requires_grad_()
    hidden = forward_block(spec, 1, weights, first)
    logits = rms_norm(hidden, weights["model.norm.weight"], spec.norm_eps) @ weights["lm_head.weight"].T
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([torch.multinomial(row.softmax(-1), 1, generator=generator)[:, 0] for row in logits.detach()])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    g = first.grad.flatten(0, 1).double()
    torch.testing.assert_close(
        metrics[0].double(), g.T @ g / ids.size, rtol=1e-3, atol=1e-3 * float(metrics[0].abs().max())
    )


# -- a run -------------------------------------------------------------------------------------------------------------

RECIPE = """
calibration: {samples: 8, length: 32}
steps:
  - quantize: {rules: [{targets: [routed_experts], codec: q4_0}, {targets: [attention], codec: q8_0},
                       {targets: [router, norms], codec: f32}]}
  - recover: {survey: 2}
export: [{container: safetensors}]
score: false
"""


def test_a_run_recovers_and_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the first block and continued, or in one go; what ships is what the journal's errors are of."""
    model = tiny_model("qwen3_moe", tmp_path / "model")
    (tmp_path / "recovered.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(
        " ".join(f"the {i} house by the river was {i % 7} years old." for i in range(90))
    )
    recipe = load_recipe(
        tmp_path / "recovered.yaml", [f"calibration.dataset={tmp_path / 'text.txt'}"], model=str(model)
    )
    plan, checkpoint = make_plan(recipe, weights=True), Checkpoint.open(model)

    def carry_out(folder: str) -> Journal:
        journal = Journal.open(tmp_path / folder, plan.digest)
        with torch.inference_mode():
            compress_model(plan, checkpoint, journal, Reporter(0))
        return journal

    whole = carry_out("whole")
    reports = [whole.units[f"block-{n:05d}"]["recovered"] for n in range(2)]
    assert any(r["kept"] for r in reports) and all(r["after"] < r["before"] for r in reports if r["kept"])
    finish = Journal.finish

    def interrupted(self: Journal, unit: str, *rest: object) -> None:
        if unit == "block-00001":
            raise KeyboardInterrupt
        finish(self, unit, *rest)

    monkeypatch.setattr(Journal, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out("killed")
    monkeypatch.undo()
    resumed = carry_out("killed")
    for tensor in plan.tensors:
        one, two = whole.fetch(tensor.name).parts, resumed.fetch(tensor.name).parts
        assert all(torch.equal(one[part], two[part]) for part in one), tensor.name
    assert without_times(resumed) == without_times(whole)
