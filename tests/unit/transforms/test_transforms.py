"""Transforms keep the function: whole models in float64, of every family; and the scales they choose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.models.checkpoint import Checkpoint
from compress.models.forward import Routing, moe
from compress.models.layers.moe import Router
from compress.models.spec import ModelSpec, load_spec
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.statistics import Moments
from compress.transforms import awq, smooth
from compress.transforms.base import Fold, apply, folds, rounding_error
from compress.transforms.options import AwqOptions, RotateOptions, SmoothOptions
from compress.transforms.rotate import Rotation
from tests.contract.blocks import logits
from tests.tiny import FAMILIES, tiny_model

VARIANTS: dict[str, tuple[str, dict]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3-one-kv-head": ("qwen3", {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True}),
    "llama-72": ("llama", {"hidden_size": 72, "num_key_value_heads": 4}),
}
"""Every family; biases everywhere; one value head for all queries; dense and sparse blocks; no power of two."""

IDS = torch.arange(24).reshape(2, 12) * 37 % 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def model(variant: str) -> tuple[ModelSpec, dict[str, Tensor]]:
        family, overrides = VARIANTS[variant]
        folder: Path = tmp_path_factory.mktemp(variant)
        tiny_model(
            family, folder, tokenizer=False, **{"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2} | overrides
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        spec, checkpoint = load_spec(config), Checkpoint.open(folder)
        return spec, {t.name: checkpoint.load(t.name).double() for t in spec.tensors()}

    return model


@pytest.fixture(autouse=True)
def exact_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder, like transformers, routes in float32, whose rounding would hide what is tested here."""

    def route(router: Router, scores: Tensor, correction: Tensor | None = None) -> Routing:
        weights, experts = scores.softmax(-1).topk(router.k, dim=-1)
        return Routing(experts, weights / weights.sum(-1, keepdim=True) if router.normalised else weights)

    monkeypatch.setattr(moe, "route", route)


def _logits(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Tensor:
    out = logits(spec, weights, IDS)
    assert out.dtype == torch.float64
    return out


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _folds(spec: ModelSpec, layer: int) -> list[Fold]:
    """Those of a block, attention first."""
    return [fold for branch in spec.branches(layer) for fold in folds(branch)]


def _all_folds(spec: ModelSpec) -> list[Fold]:
    return [fold for layer in range(spec.layers) for fold in _folds(spec, layer)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_scales_on_every_fold_keep_the_logits(models, variant: str) -> None:
    spec, weights = models(variant)
    scaled = dict(weights)
    for seed, fold in enumerate(_all_folds(spec)):
        changed = apply(scaled, fold, torch.exp(_random(fold.rows, seed=seed)))
        assert all(not torch.equal(changed[name], scaled[name]) for name in fold.names) and len(changed) == len(
            fold.names
        )
        scaled |= changed
    assert _gap(_logits(spec, scaled), _logits(spec, weights)) < 1e-12


VALUES, BOTH = {"attention.out": ("o_proj",)}, {"attention.out": ("o_proj",), "ffn.act": ("down_proj",)}
BARE = {"attention.in": ("q_proj", "k_proj", "v_proj"), "ffn.in": ("gate_proj", "up_proj")}
BESIDE = {"of the shared expert alone": ("shared_mlp.output_linear",)}
UNFOLDED = {
    "deepseek_v2": VALUES, "deepseek_v3": VALUES, "deepseek_v32": VALUES, "glm4_moe_lite": VALUES,
    "glm_moe_dsa": VALUES, "phi3": BOTH,
    "nemotron_h": {"ffn.act": ("down_proj",)}, "gpt_oss": {"ffn.act": ("down_proj",)}, "granitemoehybrid": BESIDE,
    "olmo2": BARE, "olmo3": BARE, "exaone4": BARE, "gemma4_text": {**VALUES, "router": ("router.proj",)},
}  # fmt: skip
"""Value channels are rows of a matrix that keys come from, too; those of a feed-forward lie below its gates, or are
squared or clamped; linears read the stream as it is; values are normed, and nothing but the router reads what it reads."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_folds_reach_every_linear_of_a_block_once(models, variant: str) -> None:
    spec, _ = models(variant)
    for layer in range(spec.layers):
        block = list(spec.block_tensors(layer))
        found = _folds(spec, layer)
        readers = [name for fold in found for name in fold.consumers + fold.routers]
        fixed = UNFOLDED.get(variant, {})
        left = [leaf for leaves in fixed.values() for leaf in leaves]
        free = (t.name for t in block if t.input and not any(leaf in t.name for leaf in left))
        assert sorted(readers) == sorted(free)
        assert all(spec.by_name[name].role == "router" for fold in found for name in fold.routers)
        halves = {branch.sublayer.half: branch for branch in spec.branches(layer)}
        places = {place for place in ("attention.in", "attention.out", "ffn.in", "ffn.act") if _half(place) in halves}
        assert {fold.place for fold in found} == places - fixed.keys()
        for half, branch in halves.items():
            own = {t.name for t in branch.tensors}
            assert folds(branch) == tuple(f for f in found if _half(f.place) == half)
            assert all(own.issuperset(f.names) for f in folds(branch))


def _half(place: str) -> str:
    return place.split(".")[0]


@pytest.mark.parametrize("variant", ["mistral", "qwen2", "qwen2_moe", "mixtral", "qwen3-one-kv-head"])
def test_smoothing_keeps_the_logits_and_evens_out_the_peaks(models, variant: str) -> None:
    spec, weights = models(variant)
    scaled = dict(weights)
    for seed, fold in enumerate(_all_folds(spec)):
        absmax = torch.exp(2 * _random(fold.channels, seed=seed))
        scale = smooth.scale(fold, weights, absmax, SmoothOptions(alpha=0.5))
        scaled |= apply(scaled, fold, scale)
        if fold.heads == 1:  # at alpha 1/2 activations and weights end with the same peak, channel by channel
            largest = torch.cat([scaled[name] for name in fold.consumers]).abs().amax(0)
            torch.testing.assert_close(absmax / scale.double(), largest, rtol=1e-5, atol=0)
    assert _gap(_logits(spec, scaled), _logits(spec, weights)) < 1e-12


@pytest.mark.parametrize("kinds", [("R1",), ("R2",), ("R1", "R2")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rotations_keep_the_logits(models, variant: str, kinds: tuple) -> None:
    spec, weights = models(variant)
    rotation = Rotation.draw(spec, RotateOptions(kinds=kinds))
    rotated = {}
    for tensor in spec.untied().tensors():
        loaded = []

        def load(name: str, loaded: list[str] = loaded) -> Tensor:
            loaded.append(name)
            return weights[name]

        rotated[tensor.name] = rotation.tensor(tensor.name, load).double()
        assert rotated[tensor.name].shape == tensor.shape
        assert tuple(loaded) == rotation.sources(tensor.name)
    gap = _gap(_logits(spec.untied(), rotated), _logits(spec, weights))
    assert gap > 1e-3 if spec.fixed_stream and "R1" in kinds else gap < 1e-12


def test_r1_turns_the_stream_and_nothing_else(models) -> None:
    spec, weights = models("qwen2_moe")
    rotated = {
        t.name: Rotation.draw(spec, RotateOptions(kinds=("R1",))).tensor(t.name, weights.__getitem__).double()
        for t in spec.tensors()
    }
    for t in spec.tensors():
        before, after = weights[t.name], rotated[t.name]
        if t.role == "norms":
            assert torch.equal(after, torch.ones_like(after))
        elif t.role == "biases":
            assert after is before  # of q, k and v
        elif "down_proj" in t.name or "o_proj" in t.name:
            assert _gap(after, before) > 1
            torch.testing.assert_close(after.T @ after, before.T @ before)
        else:
            norm = torch.ones(spec.hidden_size)
            if t.layer is not None:
                leaf = "input_layernorm" if "self_attn" in t.name else "post_attention_layernorm"
                norm = weights[f"model.layers.{t.layer}.{leaf}.weight"]
            elif t.role == "lm_head":
                norm = weights["model.norm.weight"]
            assert _gap(after, before) > 1
            torch.testing.assert_close(after @ after.T, before * norm**2 @ before.T)


def test_r1_spreads_an_outlier_channel(models) -> None:
    spec, weights = models("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    planted = weights | {name: weights[name] * torch.where(torch.arange(64) == 5, 50.0, 1.0)}
    after = Rotation.draw(spec, RotateOptions()).tensor(name, planted.__getitem__)

    def crest(w: Tensor) -> float:
        return float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean())

    assert crest(planted[name]) > 6 and crest(after) < 3


def test_r2_turns_value_heads_one_layer_unlike_the_next(models) -> None:
    spec, weights = models("qwen2")
    rotation = Rotation.draw(spec, RotateOptions(kinds=("R2",)))
    changed = {t.name for t in spec.tensors() if rotation.tensor(t.name, weights.__getitem__) is not weights[t.name]}
    leaves = ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    assert changed == {f"model.layers.{n}.self_attn.{leaf}" for n in range(2) for leaf in leaves}
    for leaf in leaves[:2]:
        first, second = (f"model.layers.{n}.self_attn.{leaf}" for n in range(2))
        same = weights | {second: weights[first]}
        assert _gap(rotation.tensor(second, same.__getitem__), rotation.tensor(first, same.__getitem__)) > 0.1


@pytest.mark.parametrize(("kind", "leaf"), [("R1", "q_proj"), ("R1", "o_proj"), ("R2", "v_proj")])
def test_the_seed_decides_the_rotation(models, kind: str, leaf: str) -> None:
    spec, weights = models("llama")
    name = f"model.layers.0.self_attn.{leaf}.weight"
    first, again, other = (
        Rotation.draw(spec, RotateOptions(kinds=(kind,), seed=seed)).tensor(name, weights.__getitem__)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and _gap(other, first) > 0.1


@pytest.mark.parametrize("kinds", [("R1",), ("R2",)])
def test_a_tied_model_gets_a_head_of_its_own(models, kinds: tuple) -> None:
    spec, weights = models("llama-biases")
    assert spec.tied and "lm_head.weight" not in weights
    rotation = Rotation.draw(spec, RotateOptions(kinds=kinds))
    untied = spec.untied()
    assert "lm_head.weight" in {t.name for t in untied.tensors()} and untied.config["tie_word_embeddings"] is False
    folded = kinds == ("R1",)
    norm = ("model.norm.weight",) if folded else ()
    assert rotation.sources("lm_head.weight") == ("model.embed_tokens.weight", *norm)
    head, embeddings = (
        rotation.tensor(n, weights.__getitem__) for n in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert torch.equal(head, embeddings) is not folded


def test_large_tables_are_turned_in_pieces(models, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights = models("llama")
    rotation, name = Rotation.draw(spec, RotateOptions()), "lm_head.weight"
    whole = rotation.tensor(name, weights.__getitem__)
    monkeypatch.setattr("compress.transforms.rotate.CHUNK", 64 * 100)  # 256 rows: a remainder of 56
    torch.testing.assert_close(rotation.tensor(name, weights.__getitem__), whole, rtol=1e-14, atol=1e-14)


def test_what_is_stored_in_half_precision_comes_back_in_float32(models) -> None:
    spec, weights = models("qwen2")
    low = {n: w.bfloat16() for n, w in weights.items()}
    fold = _folds(spec, 0)[1]
    assert {w.dtype for w in apply(low, fold, torch.full((fold.rows,), 2.0)).values()} == {torch.float32}
    rotated = Rotation.draw(spec, RotateOptions()).tensor("model.embed_tokens.weight", low.__getitem__)
    assert rotated.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.ones(63), torch.zeros(64), torch.full((64,), torch.nan), torch.ones(64) / 0])
def test_impossible_scales_are_refused(models, bad: Tensor) -> None:
    spec, weights = models("llama")
    with pytest.raises(ValueError, match="positive finite"):
        apply(weights, _folds(spec, 0)[0], bad)


# -- scales ------------------------------------------------------------------------------------------------------


def _rounding(name: str, weight: Tensor, importance: Tensor) -> Tensor:
    """To integers, four bits to a row; the importance is not looked at."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def _codec_rounding(name: str, weight: Tensor, importance: Tensor) -> Tensor:
    return rtn.solve(weight, torch.diag(importance), block_codec("int3-g32", weight.shape[1]), RtnOptions()).decode()


def _seen(n: int, *, loud: int | None = None, tokens: int = 500, seed: int = 3) -> tuple[Moments, Tensor]:
    x = (_random(tokens, n, seed=seed) @ (_random(n, n, seed=seed + 1) / n + torch.eye(n))).float()
    if loud is not None:
        x[:, loud] *= 30.0
    moments = Moments.zeros(n, magnitudes=True)
    moments.add(x)
    return moments, x


def _naive_error(
    fold: Fold, weights: Mapping[str, Tensor], per_channel: Tensor, x: Mapping[str, Tensor], quantize
) -> float:
    """Mean squared output error over mean squared output, token by token, without grams."""
    lost = total = 0.0
    for name in fold.consumers:
        w, inputs = weights[name].double(), x[name].double()
        importance = inputs.square().sum(0) / per_channel.double() ** 2
        q = quantize(name, (w * per_channel).float(), importance.float()).double()
        for token in inputs:
            lost += float(((q @ (token / per_channel) - w @ token) ** 2).sum())
            total += float(((w @ token) ** 2).sum())
    return lost / total


def test_the_objective_is_the_output_error_of_what_would_ship(models) -> None:
    spec, weights = models("qwen3_moe")
    fold = next(f for f in _folds(spec, 0) if f.input == "router")
    shared, x = _seen(64, loud=7)
    inputs = dict.fromkeys(fold.consumers, x)
    own = {}
    for e in (1, 4):  # two experts that saw only some of the tokens
        moments = Moments.zeros(64)
        moments.add(x[e::5])
        for name in (n for n in fold.consumers if f"experts.{e}." in n):
            own[name], inputs[name] = moments, x[e::5]
    scale = torch.exp(0.5 * _random(64))
    for quantize in (_rounding, _codec_rounding):
        ours = rounding_error(fold, weights, scale, shared, quantize, own)
        assert ours == pytest.approx(_naive_error(fold, weights, scale, inputs, quantize), rel=1e-4)


def test_the_search_takes_the_best_of_the_published_scales(models) -> None:
    spec, weights = models("qwen3")
    fold = _folds(spec, 1)[1]  # o_proj behind one value head per two query heads
    moments, x = _seen(128, loud=40)
    scale, before, after = awq.search(
        fold, weights, moments, _codec_rounding, AwqOptions(grid=4, fold=("attention.out",))
    )
    w = weights[fold.consumers[0]].double()
    mean_x = x.double().abs().mean(0).reshape(2, 2, 32).mean(1)  # [kv head, its query heads, channel]
    mean_w = (w.abs() / w.abs().amax(1, keepdim=True)).mean(0).reshape(2, 2, 32).mean(1)
    best = torch.ones(2, 32, dtype=torch.float64)
    errors = [_naive_error(fold, weights, best.repeat(1, 2).flatten(), {fold.consumers[0]: x}, _codec_rounding)]
    assert before == pytest.approx(errors[0], rel=1e-4)
    for r in (0, 0.25, 0.5, 0.75, 1):
        s = mean_x**r / (mean_w ** (1 - r) + 1e-4)
        s /= (s.max() * s.min()).sqrt()
        errors.append(_naive_error(fold, weights, s.repeat(1, 2).flatten(), {fold.consumers[0]: x}, _codec_rounding))
        best = s if errors[-1] == min(errors) else best
    assert after == pytest.approx(min(errors), rel=1e-4) and after < before
    torch.testing.assert_close(scale.double(), best.flatten(), rtol=1e-4, atol=0)


def test_query_heads_of_one_value_head_share_their_scales(models) -> None:
    spec, weights = models("qwen3")
    fold = _folds(spec, 0)[1]
    scale = torch.exp(_random(fold.rows))
    changed = apply(weights, fold, scale)
    ratio = (changed[fold.consumers[0]] / weights[fold.consumers[0]]).mean(0)  # four heads of 32
    torch.testing.assert_close(ratio, torch.cat([scale[:32], scale[:32], scale[32:], scale[32:]]))
    assert changed["model.layers.0.self_attn.v_proj.weight"].shape == (64, 64)
    assert fold.gather(fold.spread(scale)).equal(scale[:, None].expand(-1, 2))


@pytest.mark.parametrize("duo", [True, False])
def test_a_loud_channel_gets_the_largest_scale(models, duo: bool) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[2]
    moments, _ = _seen(64, loud=11)
    scale, before, after = awq.search(fold, weights, moments, _rounding, AwqOptions(duo=duo))
    assert after < 0.7 * before and int(scale.argmax()) == 11


@pytest.mark.parametrize("variant", ["llama", "qwen2_moe", "mixtral"])
def test_the_search_never_makes_rounding_worse(models, variant: str) -> None:
    spec, weights = models(variant)
    for fold in _folds(spec, 0):
        moments, _ = _seen(fold.channels)  # nothing to gain: all channels alike
        scale, before, after = awq.search(fold, weights, moments, _codec_rounding, AwqOptions(grid=3))
        assert after <= before and after == rounding_error(fold, weights, scale, moments, _codec_rounding)


def test_no_scale_where_every_scale_is_worse(models) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[0]

    def untouched_only(name: str, weight: Tensor, importance: Tensor) -> Tensor:
        return weight if torch.equal(weight, weights[name].float()) else weight + 1

    scale, before, after = awq.search(fold, weights, _seen(64, loud=3)[0], untouched_only, AwqOptions(grid=5))
    assert torch.equal(scale, torch.ones(64)) and before == after == 0


def test_a_sample_of_rows_stands_for_all(models) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[0]  # 64, 32 and 32 rows
    moments, _ = _seen(64, loud=9)
    asked: list[int] = []

    def count(name: str, weight: Tensor, importance: Tensor) -> Tensor:
        asked.append(len(weight))
        return _rounding(name, weight, importance)

    scale = torch.exp(0.3 * _random(64))
    # rows 0, 4, 8, ... of q and 0, 2, 4, ... of k and v: where the others repeat them the sample is exact
    repeats = weights | {
        n: weights[n][::k].repeat_interleave(k, 0) for n, k in zip(fold.consumers, (4, 2, 2), strict=True)
    }
    whole = rounding_error(fold, repeats, scale, moments, _rounding)
    assert rounding_error(fold, repeats, scale, moments, count, sample=3 * 16 * 64) == pytest.approx(whole, rel=1e-5)
    assert asked == [16, 16, 16]


def test_smoothing_reports_what_it_costs_the_weights(models) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[0]
    moments, _ = _seen(64, loud=3)
    scale, before, after = smooth.search(fold, weights, moments, _rounding, SmoothOptions(alpha=0.8))
    absmax = moments.peak.double()
    largest = torch.cat([weights[n] for n in fold.consumers]).abs().amax(0)
    torch.testing.assert_close(scale.double(), absmax**0.8 / largest**0.2, rtol=1e-5, atol=0)
    assert before == rounding_error(fold, weights, torch.ones(64), moments, _rounding)
    assert after == rounding_error(fold, weights, scale, moments, _rounding) != before


def test_smoothing_follows_the_loudest_of_heads_that_share_a_value_head(models) -> None:
    spec, weights = models("qwen3")
    fold = _folds(spec, 0)[1]
    absmax = torch.exp(_random(128))
    scale = smooth.scale(fold, weights, absmax, SmoothOptions(alpha=1.0)).double()
    loudest = absmax.reshape(2, 2, 32).amax(1).flatten()  # [kv head, its query heads, channel]
    torch.testing.assert_close(scale, loudest, rtol=1e-5, atol=0)
    peaks = weights[fold.consumers[0]].abs().amax(0).reshape(2, 2, 32).amax(1).flatten()
    scale = smooth.scale(fold, weights, absmax, SmoothOptions(alpha=0.0)).double()
    torch.testing.assert_close(scale, 1 / peaks, rtol=1e-5, atol=0)


def test_silent_channels_keep_their_scale(models) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[0]
    scale = smooth.scale(fold, weights, torch.where(torch.arange(64) < 3, 0.0, 2.0), SmoothOptions())
    assert scale[:3].eq(1).all() and scale[3:].ne(1).all()


def test_moments_without_magnitudes_are_an_error(models) -> None:
    spec, weights = models("llama")
    fold = _folds(spec, 0)[0]
    bare = replace(_seen(64)[0], absolute=None, peak=None)
    for method, options in ((awq, AwqOptions()), (smooth, SmoothOptions())):
        with pytest.raises(ValueError, match="magnitudes"):
            method.search(fold, weights, bare, _rounding, options)
