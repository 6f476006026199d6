"""Smaller shapes, scores and least-squares repair, against counting, brute force and float64 re-derivations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress.errors import NumericalError
from compress.models import ModelSpec, load_spec
from compress.models.forward import Taps, forward_block, forward_branch
from compress.models.layers.moe import MoE
from compress.models.spec import Branch
from compress.statistics import Moments
from compress.streaming.activations import Activations
from compress.structured.decide import decide, split_loss
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
from compress.structured.repair import Broken, Repair, least_squares_update, repair_model, repair_sublayer, repairable
from compress.structured.restructure import Restructured, merged_experts, restructure
from compress.structured.scores import Fluctuation, adopters, best, block_influence, cosines, merged, reap_terms
from compress.structured.shapes import (
    Cuts,
    Reduction,
    candidates,
    channels_only,
    likeliest,
    multiple_for,
    reduced,
    reduction_problems,
    widths_of,
)
from compress.structured.survey import LayerScores, outlier_ratios, survey
from compress.structured.view import KeptLayer, StructureView
from tests.tiny import FAMILIES, demo_model, tiny_config

DENSE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "mlp_bias": True,
    "attention_bias": True,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 50,
}
LLAMA_8B = {
    **DENSE,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
IDS = np.random.default_rng(3).integers(0, 50, (6, 12))


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of every name, norms near one."""
    out = {}
    for n, t in enumerate(spec.tensors()):
        noise = _randn(*t.shape, seed=1000 * seed + n)
        out[t.name] = 1 + 0.1 * noise if t.role == "norms" else noise * (1.5 / t.shape[-1] ** 0.5)
    return out


def _scratch(folder: Path, spec: ModelSpec, ids: np.ndarray = IDS) -> Callable[[str], Activations]:
    return lambda name: Activations(folder / f"{name}.f32", (*ids.shape, spec.hidden_size))


def _written(path: Path, values: Tensor) -> Activations:
    stream = Activations(path, tuple(values.shape))
    with stream.writing() as out:
        out.append(values)
    return stream


# -- options
@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (DropLayersOptions, {"count": 1, "ratio": 0.5}),
        (DropLayersOptions, {"ratio": None}),
        (PruneStructuredOptions, {"ratio": 0.5, "heads": 0.5}),
        (PruneStructuredOptions, {"ratio": None}),
        (PruneExpertsOptions, {"method": "best"}),
        (PruneExpertsOptions, {"ratio": 1.0}),
        (DropLayersOptions, {"damping": 0.0}),
    ],
)
def test_options_refuse_what_contradicts_itself(options: type, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        options(**wrong)


@pytest.mark.parametrize(
    "options",
    [
        DropLayersOptions(),
        DropLayersOptions(count=2),
        PruneStructuredOptions(),
        PruneStructuredOptions(heads=0.5),
        PruneStructuredOptions(channels=0.5, multiple_of=8),
        PruneExpertsOptions(method="merge", repair=False),
    ],
    ids=str,
)
def test_options_survive_being_written_out(options: Any) -> None:
    assert type(options)(**options.model_dump()) == options


def test_ratios_are_for_those_who_name_nothing_else() -> None:
    assert DropLayersOptions().ratio == PruneStructuredOptions().ratio == 0.25
    assert DropLayersOptions(count=1).ratio is PruneStructuredOptions(heads=0.5).ratio is None


# -- shapes
def _matrices(spec: ModelSpec) -> int:
    """Weights that a structured ratio counts, from the list of tensors."""
    return sum(
        t.parameters for t in spec.tensors() if t.input not in (None, "lm_head", "router") and t.role != "router"
    )


WITHOUT_GATES = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(("family", "options"), [*((family, {}) for family in FAMILIES), ("nemotron_h", WITHOUT_GATES)])
def test_a_structured_ratio_is_a_share_of_the_blocks_matrices(
    family: str, options: dict[str, Any], ratio: float
) -> None:
    """Every candidate, counted tensor by tensor, misses the ratio by half a step of the channels at most."""
    spec = load_spec(tiny_config(family, **options))
    if problems := reduction_problems(spec, structured=PruneStructuredOptions(ratio=ratio)):
        assert spec.family.fixed_channels or (spec.family.fixed_heads and ratio == 0.5), problems
        return
    shapes = candidates(spec, structured=PruneStructuredOptions(ratio=ratio))
    assert shapes
    for shape in shapes:
        share = 1 - _matrices(reduced(spec, shape)) / _matrices(spec)
        steps = [multiple_for(width, PruneStructuredOptions()) / width for width in widths_of(spec).values()]
        assert share == pytest.approx(ratio, abs=max(steps) / 2 + 1e-9)


def test_candidates_are_the_head_counts_that_the_ratio_pays_for_and_transformers_loads() -> None:
    """Llama 3.1 8B: 28 and 24 heads do not divide 4096, and one or two of eight groups are all a small ratio buys."""
    spec = load_spec(LLAMA_8B)
    of = lambda ratio: [c.kv_heads for c in candidates(spec, structured=PruneStructuredOptions(ratio=ratio))]  # noqa: E731
    assert of(0.05) == [8]
    assert of(0.25) == [1, 2, 4, 8]
    # with all heads kept, channels alone cannot lose 0.85 of everything
    assert of(0.85) == [1, 2, 4]
    assert [c.kv_heads for c in candidates(load_spec({**LLAMA_8B, "model_type": "mistral"}),
                                           structured=PruneStructuredOptions(ratio=0.25))] == list(range(1, 9))  # fmt: skip


def test_the_guess_before_scores_is_proportional_and_scores_overrule_it() -> None:
    spec, options = load_spec(LLAMA_8B), PruneStructuredOptions(ratio=0.4)
    shapes = {shape.kv_heads: shape for shape in candidates(spec, structured=options)}
    assert likeliest(spec, tuple(shapes.values()), options).kv_heads == 4
    assert shapes[2].intermediate > shapes[8].intermediate


def test_shapes_to_choose_from_have_about_the_same_size() -> None:
    """Where the multiples of a narrow model allow only one that is near, there is no choice: plans keep their word."""
    for config, ratio in ((LLAMA_8B, 0.25), (LLAMA_8B, 0.4), ({**MOE, "moe_intermediate_size": 256}, 0.25)):
        spec = load_spec(config)
        left = [_matrices(reduced(spec, s)) for s in candidates(spec, structured=PruneStructuredOptions(ratio=ratio))]
        assert max(left) - min(left) <= 0.01 * _matrices(spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_alone_pay_for_the_same_budget_with_all_heads_left(family: str) -> None:
    spec, options = load_spec(tiny_config(family)), PruneStructuredOptions(ratio=0.3)
    if spec.family.fixed_channels:
        return
    experts = PruneExpertsOptions(ratio=0.5) if spec.experts else None
    alone = channels_only(spec, None, experts, options)
    if not candidates(spec, None, experts, alone):  # nearly all of them would have to go
        assert alone.channels is not None and alone.channels > 0.7 and reduction_problems(spec, None, experts, alone)
        return
    assert candidates(spec, None, experts, alone) == tuple(
        replace(shape, kv_heads=spec.kv_heads) for shape in candidates(spec, None, experts, alone)
    )
    gone = 1 - _matrices(reduced(spec, candidates(spec, None, experts, alone)[0])) / _matrices(
        reduced(spec, candidates(spec, None, experts)[0])
    )
    assert gone == pytest.approx(0.3, abs=0.13), "channels of these tiny models go by 8 of 32"
    assert channels_only(spec, None, experts, alone) == alone


@pytest.mark.parametrize(("width", "multiple"), [(14336, 128), (768, 8), (256, 8), (96, 8), (100, 4), (11008, 128)])
def test_channels_come_in_steps_that_divide_the_width(width: int, multiple: int) -> None:
    spec = load_spec({**DENSE, "intermediate_size": width})
    kept = {
        candidates(spec, structured=PruneStructuredOptions(channels=share))[0].intermediate
        for share in np.linspace(0.1, 0.9, 81).tolist()
    }
    assert np.gcd.reduce(sorted(kept)) == multiple


FEWER = {0: 0, 32: 24, 48: 40, 64: 48, 96: 72}
"""Widths with a quarter of their channels gone."""


@pytest.mark.parametrize("family", FAMILIES)
def test_reduced_configs_are_stock_and_say_what_the_spec_says(family: str) -> None:
    import transformers

    spec = load_spec(tiny_config(family))
    steps: dict[str, Any] = {}
    mixtures = [s for block in spec.blocks for s in block if isinstance(s, MoE)]
    if len(set(spec.blocks)) == 1:
        steps["drop"] = DropLayersOptions(count=1)
    channels = not spec.family.fixed_channels
    heads = channels and not spec.family.fixed_heads
    if channels:
        steps["structured"] = PruneStructuredOptions(heads=0.5 if heads else None, channels=0.25)
    if mixtures and mixtures[0].router.groups == 1:
        steps["experts"] = PruneExpertsOptions(ratio=0.5)
    assert reduction_problems(spec, **steps) == []
    small = reduced(spec, candidates(spec, **steps)[0])
    assert load_spec(json.loads(json.dumps(small.config))) == small
    layers = spec.layers - ("drop" in steps)
    groups = spec.kv_heads // 2 if heads else spec.kv_heads
    counts = (layers, spec.heads // spec.kv_heads * groups, groups, spec.head_dim)
    assert (small.layers, small.heads, small.kv_heads, small.head_dim) == counts
    assert small.experts == (spec.experts // 2 if "experts" in steps else spec.experts)
    widths = [spec.intermediate_size, spec.moe_intermediate_size, spec.shared_intermediate_size]
    if channels:  # a width that no layer has stays as it is written
        dense = len(mixtures) < spec.layers or widths[0] in (widths[1], widths[2])
        widths = [FEWER[width] if n or dense else width for n, width in enumerate(widths)]
    assert [small.intermediate_size, small.moe_intermediate_size, small.shared_intermediate_size] == widths
    config = transformers.AutoConfig.for_model(**small.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stored = {id(p): p for p in model.state_dict(keep_vars=True).values()}  # a tied head is in it twice
    assert sum(p.numel() for p in stored.values()) == sum(t.parameters for t in small.tensors())


def test_lists_by_layer_are_cut_with_the_layers() -> None:
    config = {
        **DENSE,
        "model_type": "qwen2",
        "layer_types": ["full_attention"] * 3,
        "max_window_layers": 3,
        "mlp_only_layers": [0, 1, 2],
    }
    small = reduced(load_spec(config), candidates(load_spec(config), DropLayersOptions(count=1))[0])
    assert small.config["layer_types"] == ["full_attention"] * 2
    assert small.config["max_window_layers"] == 2 and small.config["mlp_only_layers"] == [0, 1]
    assert config["layer_types"] == ["full_attention"] * 3


def test_the_number_of_experts_is_written_under_the_name_it_had() -> None:
    for name in ("num_experts", "num_local_experts"):
        config = {k: v for k, v in MOE.items() if k != "num_experts"} | {name: 4}
        small = reduced(load_spec(config), candidates(load_spec(config), experts=PruneExpertsOptions())[0])
        assert small.config[name] == small.experts == 3
        assert not {"num_experts", "num_local_experts"} - {name} & set(small.config)


D, E, S = DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
WINDOWED = {**DENSE, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "steps", "says"),
    [
        (DENSE, {"drop": D(ratio=0.1)}, "removes none of 3 layers; give count: 1"),
        (DENSE, {"drop": D(count=3)}, "keep at least one"),
        (WINDOWED, {"drop": D(count=1)}, "sliding window"),
        ({**MOE, "mlp_only_layers": [0]}, {"drop": D(count=1)}, "dense layers and layers with experts"),
        (DENSE, {"experts": E()}, "no routed experts"),
        (MOE, {"experts": E(ratio=0.1)}, "use 0.25 or more"),
        (MOE, {"experts": E(ratio=0.7)}, "use 0.5 or less"),
        (DENSE, {"structured": S(heads=0.2)}, "removes none of 2 groups"),
        (DENSE, {"structured": S(heads=0.9)}, "removes all 2 groups"),
        (LLAMA_8B, {"structured": S(heads=0.25)}, "heads can be 0.5, 0.75, 0.875"),
        (DENSE, {"structured": S(multiple_of=64)}, "32 channels, fewer than multiple_of"),
        (DENSE, {"structured": S(ratio=0.01)}, "less than one step of 0.25"),
        (DENSE, {"structured": S(heads=0.5, channels=0.01)}, "less than one step"),
        (DENSE, {"structured": S(ratio=0.97)}, "more than can go"),
        (DENSE, {"structured": S(channels=0.98)}, "more than can go"),
    ],
)
def test_impossible_steps_are_refused_in_a_line_with_a_way_out(
    config: dict[str, Any], steps: dict[str, Any], says: str
) -> None:
    problems = reduction_problems(load_spec(config), **steps)
    assert len(problems) == 1 and says in problems[0], problems
    name = {"drop": "drop_layers", "experts": "prune_experts", "structured": "prune_structured"}[next(iter(steps))]
    assert problems[0].startswith(f"{name}: ") and "\n" not in problems[0]


def test_all_problems_are_told_at_once_and_alike_layers_may_go() -> None:
    assert len(reduction_problems(load_spec(DENSE), D(count=9), E(), S(multiple_of=64))) == 3
    assert reduction_problems(load_spec({**WINDOWED, "max_window_layers": 0}), D(count=1)) == []
    assert reduction_problems(load_spec({**WINDOWED, "use_sliding_window": False}), D(count=1)) == []


# -- scores
def test_block_influence_is_one_minus_the_cosine() -> None:
    x = _randn(5, 7, 16)
    values = block_influence(torch.stack([x, x, x, x * 0]), torch.stack([3 * x, -x, x.roll(1, -1), x]))
    torch.testing.assert_close(values[0], torch.zeros(5, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(values[1], torch.full((5, 7), 2.0), atol=1e-6, rtol=0)
    wide = x.double().numpy()
    cosine = (wide * np.roll(wide, 1, -1)).sum(-1) / np.square(wide).sum(-1)
    np.testing.assert_allclose(values[2].numpy(), 1 - cosine, atol=1e-6)
    torch.testing.assert_close(values[3], torch.ones(5, 7))


def test_fluctuation_is_the_sample_variance_times_the_squared_norm_of_the_column() -> None:
    """In float64 and at once; a mean a thousand times the deviation does not drown it."""
    x, weight = _randn(300, 8) + torch.tensor([0.0, 1000.0] * 4), _randn(5, 8, seed=1)
    one = Fluctuation.zeros(8)
    for part in x.split(37):
        one.add(part)
    expected = np.var(x.double().numpy(), axis=0, ddof=1) * np.square(weight.double().numpy()).sum(0)
    np.testing.assert_allclose(one.metric(weight), expected, rtol=1e-4)


def test_fluctuation_weighs_tokens_by_their_squared_gate() -> None:
    x, gate, weight = _randn(200, 8), torch.rand(200, generator=torch.Generator().manual_seed(1)), _randn(5, 8, seed=2)
    one = Fluctuation.zeros(8)
    for at in (slice(0, 50), slice(50, 50), slice(50, 200)):
        one.add(x[at], gate[at])
    shares = np.square(gate.double().numpy())
    variance = np.cov(x.double().numpy().T, aweights=shares, ddof=0).diagonal() * 200 / 199
    np.testing.assert_allclose(one.metric(weight), variance * np.square(weight.double().numpy()).sum(0), rtol=1e-5)


def test_an_input_that_nothing_or_one_token_reached_scores_zero() -> None:
    one = Fluctuation.zeros(4)
    assert not one.metric(_randn(3, 4)).any()
    one.add(_randn(1, 4))
    assert not one.metric(_randn(3, 4)).any()
    one.add(_randn(2, 4), torch.zeros(2))
    assert torch.isfinite(one.metric(_randn(3, 4))).all()


def test_reap_is_gate_times_output_norm() -> None:
    act, down, gate = _randn(20, 6), _randn(4, 6, seed=1), torch.rand(20)
    expected = [g * np.sqrt(sum((down.double() @ a.double()).numpy() ** 2)) for a, g in zip(act, gate, strict=True)]
    np.testing.assert_allclose(reap_terms(act, down, gate), expected, rtol=1e-5)


def test_best_keeps_the_highest_in_order_and_the_first_of_equals() -> None:
    assert best(torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), 3) == (0, 2, 4)
    assert best(torch.zeros(5), 2) == (0, 1)


def test_adopters_are_the_likest_kept_ones() -> None:
    likeness = cosines((x := _randn(6, 4).double()) @ x.T)
    kept = (1, 4)
    adopted = adopters(likeness, kept)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for e in (0, 2, 3, 5):
        nearest = min(kept, key=lambda k: np.square(unit[e] - unit[k]).sum())  # nearest unit vector = largest cosine
        assert e in adopted[nearest]
    assert sorted(itertools.chain(*adopted.values())) == [0, 2, 3, 5]
    assert not cosines(torch.zeros(3, 3)).any()


def _expert(n: int, h: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return _randn(n, h, seed=seed), _randn(n, h, seed=seed + 1), _randn(h, n, seed=seed + 2)


def test_merging_undoes_permutations_of_neurons() -> None:
    gate, up, down = first = _expert(9, 5, 0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    twin = (gate[order], up[order], down[:, order])
    for mine, theirs in zip(first, merged([first, twin, twin], torch.tensor([1.0, 2.0, 3.0])), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_merging_averages_in_the_nearest_of_all_orders() -> None:
    """Brute force over all 120 orders of five neurons."""
    first, second = _expert(5, 3, 10), _expert(5, 3, 20)
    orders = [torch.tensor(p) for p in itertools.permutations(range(5))]
    turned = [(second[0][p], second[1][p], second[2][:, p]) for p in orders]
    nearest = min(turned, key=lambda t: sum(float((a - b).square().sum()) for a, b in zip(t, first, strict=True)))
    result = merged([first, second], torch.tensor([3.0, 1.0]))
    for mine, a, b in zip(result, first, nearest, strict=True):
        torch.testing.assert_close(mine, 0.75 * a + 0.25 * b)
    assert merged([first, second], torch.zeros(2))[0] is first[0]


# -- decisions
def _scores(spec: ModelSpec, seed: int = 0, **changes: Any) -> list[LayerScores]:
    out = []
    for layer in range(spec.layers):
        random = torch.Generator().manual_seed(seed + layer)
        draw = lambda *shape, random=random: torch.rand(*shape, generator=random, dtype=torch.float64)  # noqa: E731
        experts = spec.experts if spec.is_sparse(layer) else 0
        channels = {f"experts.{e}": draw(spec.moe_intermediate_size) for e in range(experts)}
        channels = channels or {"mlp": draw(spec.intermediate_size)}
        values = (float(draw(1)), draw(spec.kv_heads), channels, draw(experts), draw(experts), draw(experts, experts))
        out.append(LayerScores(*values))
    return out


def test_the_lowest_go_layer_by_layer() -> None:
    spec = load_spec(MOE)
    scores = _scores(spec)
    steps = (None, PruneExpertsOptions(ratio=0.5), PruneStructuredOptions(heads=0.5, channels=0.5))
    reduction, kept = decide(spec, scores, Cuts(*steps))
    assert reduction == Reduction(0, 2, 1, 32, 8, 0)
    for own, k in zip(scores, kept, strict=True):
        gone = set(range(4)) - set(k.experts)
        assert max(own.saliency[e] for e in gone) < min(own.saliency[e] for e in k.experts)
        assert k.kv_heads == (int(own.heads.argmax()),)
        assert set(k.channels) == {f"experts.{e}" for e in k.experts}
        for name, index in k.channels.items():
            values = own.channels[name]
            assert len(index) == 8 and index.tolist() == sorted(index.tolist())
            assert set(index.tolist()) == set(np.argsort(values.numpy())[8:].tolist())


@pytest.mark.parametrize("method", ["frequency", "merge"])
def test_other_methods_keep_the_most_frequent_experts(method: str) -> None:
    spec = load_spec(MOE)
    scores = _scores(spec)
    _, kept = decide(spec, scores, Cuts(experts=PruneExpertsOptions(method=method, ratio=0.25)))
    assert [set(range(4)) - set(k.experts) for k in kept] == [{int(s.frequency.argmin())} for s in scores]


def test_layers_of_least_influence_go() -> None:
    spec = load_spec(DENSE)
    scores = _scores(spec)
    influence = [s.influence for s in scores]
    reduction, kept = decide(spec, scores, Cuts(drop=DropLayersOptions(count=2)))
    assert [k.layer for k in kept] == [int(np.argmax(influence))] and reduction.dropped == 2
    assert kept[0].kv_heads == (0, 1) and not kept[0].channels


def test_the_split_between_heads_and_channels_loses_least() -> None:
    """Worthless heads go; worthless channels leave all heads; what is lost is counted by hand."""
    spec, options = load_spec(DENSE), PruneStructuredOptions(ratio=0.25, multiple_of=1)
    base = _scores(spec)

    def scaled(heads: float, channels: float) -> list[LayerScores]:
        return [
            LayerScores(
                s.influence,
                s.heads * heads,
                {"mlp": s.channels["mlp"] * channels},
                s.saliency,
                s.frequency,
                s.likeness,
            )
            for s in base
        ]

    assert {shape.kv_heads for shape in candidates(spec, structured=options)} == {1, 2}
    assert decide(spec, scaled(1e-3, 1.0), Cuts(structured=options))[0].kv_heads == 1
    assert decide(spec, scaled(1e3, 1.0), Cuts(structured=options))[0].kv_heads == 2
    shape = next(s for s in candidates(spec, structured=options) if s.kv_heads == 1)
    lost = []
    for s in base:
        heads, channels = s.heads.tolist(), sorted(s.channels["mlp"].tolist())
        lost.append((min(heads) + sum(channels[: 32 - shape.intermediate])) / (sum(heads) + sum(channels)))
    assert split_loss(base, [()] * 3, shape) == pytest.approx(sum(lost) / 3)


# -- the view
def test_the_view_selects_by_hand() -> None:
    """Every tensor of a small model, from slices written out."""
    spec = load_spec({**MOE, "attention_bias": True})
    weights = _weights(spec)
    reduction = Reduction(1, 2, 1, 32, 3, 0)
    channels = {"experts.1": torch.tensor([0, 5, 9]), "experts.3": torch.tensor([2, 3, 15])}
    view = StructureView((KeptLayer(1, (1, 3), (1,), channels),), {}, spec, reduced(spec, reduction))
    old, new = "model.layers.1.", "model.layers.0."
    expected = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        expected[f"{new}{norm}.weight"] = weights[f"{old}{norm}.weight"]
    for leaf, rows in (("q", slice(16, 32)), ("k", slice(8, 16)), ("v", slice(8, 16))):
        for kind in ("weight", "bias"):
            expected[f"{new}self_attn.{leaf}_proj.{kind}"] = weights[f"{old}self_attn.{leaf}_proj.{kind}"][rows]
    expected[f"{new}self_attn.o_proj.weight"] = weights[f"{old}self_attn.o_proj.weight"][:, 16:32]
    expected[f"{new}self_attn.o_proj.bias"] = weights[f"{old}self_attn.o_proj.bias"]
    expected[f"{new}mlp.gate.weight"] = weights[f"{old}mlp.gate.weight"][[1, 3]]
    for e, index in enumerate(channels.values()):
        mine, theirs = f"{new}mlp.experts.{e}.", f"{old}mlp.experts.{2 * e + 1}."
        for leaf in ("gate", "up"):
            expected[f"{mine}{leaf}_proj.weight"] = weights[f"{theirs}{leaf}_proj.weight"][index.tolist()]
        expected[f"{mine}down_proj.weight"] = weights[f"{theirs}down_proj.weight"][:, index.tolist()]
    assert expected.keys() == {t.name for t in view.spec.tensors()}
    for t in view.spec.tensors():
        assert torch.equal(view.load(t.name, weights.__getitem__), expected[t.name]), t.name
        assert expected[t.name].shape == t.shape
    with pytest.raises(KeyError):
        view.load("model.layers.1.input_layernorm.weight", weights.__getitem__)


# -- repair
def _half(spec: ModelSpec, half: str) -> Branch:
    """A sub-layer of the first block."""
    (branch,) = (b for b in spec.branches(0) if b.sublayer.half == half)
    return branch


def _weights_of(branch: Branch) -> dict[str, Tensor]:
    everything = _weights(branch.spec)
    return {t.name: everything[t.name] for t in branch.tensors}


def _repaired(
    branch: Branch, weights: dict[str, Tensor], streams: tuple[Activations, Activations], dtypes: dict | None = None
) -> Repair:
    """With a damping of 0.2."""
    return repair_sublayer(Broken(branch, weights, *streams), 0.2, dtypes)


def _seen(branch: Branch, weights: dict[str, Tensor], hidden: Tensor) -> tuple[dict, Tensor, Any]:
    seen, routes = {}, []
    note = lambda key, x, gate: seen.update({key: (x, gate)})  # noqa: E731
    out = forward_branch(branch, weights, hidden, Taps(note, on_route=routes.append))
    return seen, out, routes[0] if routes else None


def _ridge_lstsq(x: np.ndarray, e: np.ndarray, damping: float) -> np.ndarray:
    """argmin |x u - e|^2 + ridge |u|^2 by numpy's lstsq on the stacked system; u: [n, m]."""
    ridge = damping * np.square(x).sum(0).mean()
    stacked = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    return np.linalg.lstsq(stacked, np.concatenate([e, np.zeros((x.shape[1], e.shape[1]))]), rcond=None)[0]


def _update(x: Tensor, e: Tensor, held: np.ndarray, damping: float) -> np.ndarray:
    """The update [m, n] from the rows that are not held out, shortened to what serves those that are."""
    x, e = x.double().numpy(), e.double().numpy()
    u = _ridge_lstsq(x[~held], e[~held], damping)
    steps = np.linspace(0, 1, 10001)
    errors = [np.square(e[held] - t * (x[held] @ u)).sum() for t in steps]
    return steps[int(np.argmin(errors))] * u.T


HELD = np.arange(6 * 12) // 12 == 5  # of six windows of twelve tokens the last


def _repairable_wish(hidden: Tensor, out: Tensor, x: Tensor, seed: int) -> Tensor:
    """A stream that another last linear would reach, but for noise."""
    missing = x @ (0.3 * _randn(x.shape[1], hidden.shape[-1], seed=seed))
    return out + missing.view_as(out) + 0.3 * _randn(*out.shape, seed=seed + 1)


@pytest.mark.parametrize("half", ["attention", "ffn"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_repair_is_ridge_regression_on_what_the_stream_misses(factor: float, half: str, tmp_path: Path) -> None:
    """Of a sub-layer that adds a part of what it gives, so much more."""
    granite = {"model_type": "granite", "attention_multiplier": 0.5, "residual_multiplier": factor}
    spec = load_spec(DENSE if factor == 1.0 else {**DENSE, **granite})
    branch = _half(spec, half)
    weights = _weights_of(branch)
    given = {name: values.clone() for name, values in weights.items()}
    hidden = _randn(6, 12, 16, seed=5)
    seen, out, _ = _seen(branch, weights, hidden)
    x = seen["attention.out" if half == "attention" else "mlp.act"][0]
    wanted = _repairable_wish(hidden, out, x, 6)
    repair = _repaired(branch, weights, (_written(tmp_path / "a", hidden), _written(tmp_path / "b", wanted)))
    name = "model.layers.0." + ("self_attn.o_proj.weight" if half == "attention" else "mlp.down_proj.weight")
    assert set(repair.tensors) == {name}
    lag = (wanted - out).flatten(0, 1)
    update = _update(x, lag / factor, HELD, 0.2)
    np.testing.assert_allclose(repair.tensors[name], weights[name].double().numpy() + update, atol=1e-4)
    assert np.abs(update).max() > 0.1
    energy = float(wanted[5].square().sum())
    assert repair.before == pytest.approx(float(lag[HELD].square().sum()) / energy, rel=1e-5)
    after = _seen(branch, {**weights, **repair.tensors}, hidden)[1]
    assert repair.after == pytest.approx(float((wanted - after)[5].square().sum()) / energy, rel=1e-5)
    assert repair.after < 0.5 * repair.before
    assert all(torch.equal(given[n], weights[n]) for n in weights)


def test_experts_are_repaired_on_their_tokens_and_less_the_fewer_they_are(tmp_path: Path) -> None:
    """lstsq with rows times the gate; the ridge grows by columns over tokens, an expert without tokens stays."""
    spec = load_spec({**MOE, "num_experts": 5})
    branch = _half(spec, "ffn")
    weights = _weights_of(branch)
    router = weights["model.layers.0.mlp.gate.weight"]
    router[2:] = torch.stack([-router[0], -router[1], torch.zeros(16)])  # two others always beat the last
    hidden = _randn(6, 12, 16, seed=5)
    seen, out, routing = _seen(branch, weights, hidden)
    wanted = _repairable_wish(hidden, out, hidden.flatten(0, 1), 6)
    repair = _repaired(branch, weights, (_written(tmp_path / "a", hidden), _written(tmp_path / "b", wanted)))
    lag = (wanted - out).flatten(0, 1)
    reached = [e for e in range(5) if f"experts.{e}.act" in seen]
    assert reached == [0, 1, 2, 3]
    assert f"model.layers.0.mlp.experts.{4}.down_proj.weight" not in repair.tensors
    moved = []
    for e in reached:
        x, gate = seen[f"experts.{e}.act"]
        rows = [n for n, choice in enumerate(routing.experts.tolist()) if e in choice]
        assert len(rows) == len(x)
        fitted = int((~HELD[rows]).sum())
        update = _update(x * gate[:, None], lag[rows] * gate[:, None], HELD[rows], 0.2 + 16 / fitted)
        name = f"model.layers.0.mlp.experts.{e}.down_proj.weight"
        values = repair.tensors.get(name, weights[name])
        np.testing.assert_allclose(values, weights[name].double().numpy() + update, atol=1e-4)
        moved.append(float(np.abs(update).max()))
    assert max(moved) > 0.02
    assert repair.after < repair.before


def test_text_too_short_to_hold_any_out_repairs_nothing(tmp_path: Path) -> None:
    spec = load_spec(DENSE)
    branch = _half(spec, "ffn")
    weights = _weights_of(branch)
    streams = tuple(_written(tmp_path / n, _randn(1, 12, 16, seed=s)) for n, s in (("a", 5), ("b", 6)))
    assert _repaired(branch, weights, streams).tensors == {}


def test_what_only_fits_by_chance_is_left_alone(tmp_path: Path) -> None:
    """The held-out window wants the opposite of the others: no step towards them serves it."""
    spec = load_spec(DENSE)
    branch = _half(spec, "ffn")
    weights = _weights_of(branch)
    hidden = _randn(1, 12, 16, seed=5).repeat(6, 1, 1)
    out = _seen(branch, weights, hidden)[1]
    missing = _randn(12, 16, seed=6).repeat(6, 1, 1)
    missing[5] *= -1
    streams = _written(tmp_path / "a", hidden), _written(tmp_path / "b", out + missing)
    repair = _repaired(branch, weights, streams)
    assert repair.tensors == {} and repair.after == repair.before > 0


def test_what_rounding_would_undo_is_left_alone(tmp_path: Path) -> None:
    """The stream misses less than bfloat16 loses of the weight."""
    spec = load_spec(DENSE)
    branch = _half(spec, "ffn")
    weights = _weights_of(branch)
    hidden = _randn(6, 12, 16, seed=5)
    seen, out, _ = _seen(branch, weights, hidden)
    wanted = out + 1e-4 * (_repairable_wish(hidden, out, seen["mlp.act"][0], 6) - out)
    streams = _written(tmp_path / "a", hidden), _written(tmp_path / "b", wanted)
    dtypes = dict.fromkeys(weights, torch.bfloat16)
    assert _repaired(branch, weights, streams).tensors
    coarse = _repaired(branch, weights, streams, dtypes)
    assert coarse.tensors == {} and coarse.after == coarse.before > 0


def test_an_update_of_nothing_is_zero() -> None:
    empty, some = Moments.zeros(4, residual=3), Moments.zeros(4, residual=3)
    some.add(_randn(9, 4), lag=_randn(9, 3, seed=1))
    silent = Moments.zeros(4, residual=3)
    silent.add(torch.zeros(9, 4), lag=_randn(9, 3, seed=1))
    for fitted, judged in ((empty, some), (some, empty), (silent, some), (some, silent), (silent, silent)):
        assert not least_squares_update(fitted, judged, 0.1).any()


def test_moments_beyond_memory_take_more_passes_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(MOE)
    branch = _half(spec, "ffn")
    weights = _weights_of(branch)
    hidden = _randn(6, 12, 16, seed=5)
    wanted = _repairable_wish(hidden, _seen(branch, weights, hidden)[1], hidden.flatten(0, 1), 6)
    streams = _written(tmp_path / "a", hidden), _written(tmp_path / "b", wanted)
    at_once = _repaired(branch, weights, streams)
    monkeypatch.setattr("compress.structured.repair.MOMENTS_BYTES", 1)
    one_by_one = _repaired(branch, weights, streams)
    assert at_once.tensors.keys() == one_by_one.tensors.keys() and len(at_once.tensors) > 1
    assert all(torch.equal(at_once.tensors[n], one_by_one.tensors[n]) for n in at_once.tensors)


def test_what_cannot_stand_for_the_whole_half_is_left_alone() -> None:
    shared = load_spec({**tiny_config("qwen2_moe"), "norm_topk_prob": True})
    assert repairable(_half(shared, "ffn")) == []
    assert repairable(_half(load_spec({**MOE, "norm_topk_prob": False}), "ffn")) == []
    assert repairable(_half(shared, "attention")) == ["model.layers.0.self_attn.o_proj.weight"]
    assert len(repairable(_half(load_spec(MOE), "ffn"))) == 4


def test_a_stream_that_misses_nothing_is_not_touched(tmp_path: Path) -> None:
    """Nothing removed: both models are the same, so nothing is repaired."""
    spec = load_spec(MOE)
    weights = _weights(spec)
    whole = KeptLayer(0, (0, 1, 2, 3), (0, 1)), KeptLayer(1, (0, 1, 2, 3), (0, 1))
    view = StructureView(whole, {}, spec, spec)
    tensors, repairs = repair_model(view, weights.__getitem__, IDS, _scratch(tmp_path, spec), 0.1)
    assert tensors == {}
    for repair in (repair for halves in repairs for repair in halves.values()):
        assert repair.after == repair.before < 1e-14 and not repair.report["kept"]
    assert not list(tmp_path.iterdir())


def _final_states(spec: ModelSpec, load: Callable[[str], Tensor], ids: np.ndarray) -> Tensor:
    hidden = load("model.embed_tokens.weight")[torch.from_numpy(ids)].float()
    for layer in range(spec.layers):
        weights = {t.name: load(t.name).float() for t in spec.block_tensors(layer)}
        hidden = forward_block(spec, layer, weights, hidden)
    return hidden.double()


@pytest.mark.parametrize("layers", [(1, 2), (0, 2), (0, 1), (1,)])
def test_errors_are_those_of_the_finished_model_wherever_layers_went(layers: tuple[int, ...], tmp_path: Path) -> None:
    """The last half's error on the held-out window, from both models run from end to end, with values in bfloat16."""
    spec = load_spec(DENSE)
    weights = {n: w.bfloat16() for n, w in _weights(spec).items()}
    small = reduced(spec, Reduction(3 - len(layers), 0, 2, 24, 24, 0))
    kept = tuple(KeptLayer(n, (), (0, 1), {"mlp": torch.arange(24)}) for n in layers)
    view = StructureView(kept, {}, spec, small)
    tensors, repairs = repair_model(view, weights.__getitem__, IDS, _scratch(tmp_path, spec), 0.1)
    assert tensors and {values.dtype for values in tensors.values()} == {torch.bfloat16}
    view = StructureView(kept, tensors, spec, small)
    wanted = _final_states(spec, weights.__getitem__, IDS[-1:])
    found = _final_states(small, lambda name: view.load(name, weights.__getitem__), IDS[-1:])
    missed = float((wanted - found).square().sum() / wanted.square().sum())
    assert repairs[-1]["ffn"].after == pytest.approx(missed, rel=1e-4)
    assert any(repair.tensors for halves in repairs for repair in halves.values())


# -- the whole
STEPS: list[tuple[dict, tuple]] = [
    (DENSE, (DropLayersOptions(count=1), None, PruneStructuredOptions(ratio=0.3))),
    (MOE, (DropLayersOptions(count=1), PruneExpertsOptions(ratio=0.25), PruneStructuredOptions(heads=0.5))),
    (MOE, (None, PruneExpertsOptions(ratio=0.5, method="merge"), PruneStructuredOptions(channels=0.5))),
    (MOE, (None, PruneExpertsOptions(ratio=0.5, method="frequency", repair=False), None)),
]


@pytest.mark.parametrize(("config", "steps"), STEPS)
def test_a_restructured_model_survives_being_written_and_is_the_same_again(
    config: dict[str, Any], steps: tuple, tmp_path: Path
) -> None:
    spec, seen = load_spec(config), []
    weights = _weights(spec)
    given = {name: values.clone() for name, values in weights.items()}
    result = restructure(spec, Cuts(*steps), weights.__getitem__, IDS, _scratch(tmp_path, spec), seen.append)
    assert not list(tmp_path.iterdir())
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert all(torch.equal(given[name], weights[name]) for name in weights)
    assert result.spec == reduced(spec, result.reduction)

    tensors, facts = result.state()
    again = Restructured.restore(spec, tensors, json.loads(json.dumps(facts, allow_nan=False)))
    other = restructure(spec, Cuts(*steps), weights.__getitem__, IDS, _scratch(tmp_path, spec))
    for same in (again, other):
        assert same.spec == result.spec and same.report == json.loads(json.dumps(result.report))
        for t in result.spec.tensors():
            mine = result.view.load(t.name, weights.__getitem__)
            assert mine.shape == t.shape and torch.isfinite(mine).all()
            assert torch.equal(mine, same.view.load(t.name, weights.__getitem__)), t.name


def test_steps_share_one_repair_with_the_largest_damping_that_is_asked_for(tmp_path: Path) -> None:
    spec = load_spec(DENSE)
    weights = _weights(spec)

    def repaired(drop: dict[str, Any], cut: dict[str, Any]) -> dict[str, Tensor]:
        steps = (DropLayersOptions(count=1, **drop), None, PruneStructuredOptions(channels=0.5, **cut))
        return dict(restructure(spec, Cuts(*steps), weights.__getitem__, IDS, _scratch(tmp_path, spec)).tensors)

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

    strong = repaired({"damping": 0.5}, {"damping": 0.5})
    assert strong and same(strong, repaired({"damping": 0.5}, {"damping": 0.1}))
    assert same(strong, repaired({"damping": 0.5}, {"damping": 0.9, "repair": False}))
    assert not same(strong, repaired({"damping": 0.1}, {"damping": 0.1}))
    assert not repaired({"repair": False}, {"repair": False})


def test_experts_that_go_are_averaged_into_the_likest_and_then_cut() -> None:
    """Expert 1 is expert 0 with its neurons in another order; experts 2 and 3 are strangers, 3 the likest to 2."""
    spec = load_spec({**MOE, "num_hidden_layers": 1})
    weights = _weights(spec)
    root, order = "model.layers.0.mlp.experts.", torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for leaf in ("gate", "up"):
        weights[f"{root}1.{leaf}_proj.weight"] = weights[f"{root}0.{leaf}_proj.weight"][order]
    weights[f"{root}1.down_proj.weight"] = weights[f"{root}0.down_proj.weight"][:, order]
    likeness = torch.eye(4, dtype=torch.float64)
    likeness[0, 1] = likeness[1, 0] = likeness[2, 3] = likeness[3, 2] = 0.5
    frequency = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    scores = [LayerScores(0.0, torch.ones(2), {}, torch.zeros(4), frequency, likeness)]
    channels = {f"experts.{e}": torch.arange(e, 12 + e) for e in (0, 2)}
    reduction = Reduction(0, 2, 2, 32, 12, 0)
    view = StructureView((KeptLayer(0, (0, 2), (0, 1), channels),), {}, spec, reduced(spec, reduction))
    tensors = merged_experts(view, scores, weights.__getitem__)
    assert len(tensors) == 6

    def triple(e: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(weights[f"{root}{e}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down"))

    stranger = merged([triple(2), triple(3)], torch.tensor([0.3, 0.2]))
    for e, (gate, up, down) in enumerate((triple(0), stranger)):
        at = channels[f"experts.{2 * e}"]
        for leaf, expected in (("gate", gate[at]), ("up", up[at]), ("down", down[:, at])):
            torch.testing.assert_close(tensors[f"{root}{e}.{leaf}_proj.weight"], expected)
    loaded = StructureView(view.kept, tensors, spec, view.spec)
    assert all(torch.equal(loaded.load(name, weights.__getitem__), values) for name, values in tensors.items())


def test_nothing_but_finite_values_from_models_that_are_all_zero(tmp_path: Path) -> None:
    spec = load_spec(MOE)
    weights = {name: torch.zeros_like(values) for name, values in _weights(spec).items()}
    steps = (None, PruneExpertsOptions(method="merge"), PruneStructuredOptions())
    result = restructure(spec, Cuts(*steps), weights.__getitem__, IDS[:1], _scratch(tmp_path, spec, IDS[:1]))
    assert not any(result.view.load(t.name, weights.__getitem__).any() for t in result.spec.tensors())
    json.dumps(result.report, allow_nan=False)
    assert outlier_ratios(spec, weights.__getitem__, IDS, _scratch(tmp_path, spec)) == [0.0, 0.0]


def test_activations_that_overflow_name_the_block(tmp_path: Path) -> None:
    spec = load_spec(DENSE)
    weights = _weights(spec)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e38
    with pytest.raises(NumericalError, match="block 1"):
        survey(spec, weights.__getitem__, IDS, _scratch(tmp_path, spec))


# -- outliers
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_outlier_ratios_count_products_far_above_the_layers_mean(config: dict[str, Any], tmp_path: Path) -> None:
    """All products of a layer in one float64 list; a loud column makes outliers."""
    spec = load_spec(config)
    weights = _weights(spec)
    weights["model.layers.1.post_attention_layernorm.weight"][3] = 30.0
    ratios = outlier_ratios(spec, weights.__getitem__, IDS, _scratch(tmp_path, spec), 3.0)
    hidden = weights["model.embed_tokens.weight"][torch.from_numpy(IDS)]
    for layer in range(spec.layers):
        squares: dict[str, Tensor] = {}
        note = lambda key, x, gate, to=squares: to.update(  # noqa: E731
            {key: ((x if gate is None else x * gate[:, None]).double() ** 2).sum(0) / IDS.size}
        )
        for branch in spec.branches(layer):
            hidden = forward_branch(branch, weights, hidden, Taps(note))
        products = []
        for t in spec.block_tensors(layer):
            if t.input and t.role != "router":
                products.append((weights[t.name].double().abs() * squares[t.input].sqrt()).flatten())
        values = torch.cat(products)
        assert ratios[layer] == pytest.approx(float((values > 3.0 * values.mean()).double().mean()), abs=2e-4)
    assert 0 < min(ratios) < max(ratios) < 0.2
    assert not list(tmp_path.iterdir())


def test_the_demo_models_shape_is_what_its_config_says() -> None:
    spec = load_spec(json.loads((demo_model() / "config.json").read_text()))
    shape = candidates(spec, D(), E(), S(channels=0.25))[0]
    assert shape == Reduction(1, 9, 2, 512, 192, 0)
