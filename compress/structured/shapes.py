"""The shape of a model that loses layers, experts, heads or channels, from config.json alone: no weights, no torch.

Stock checkpoints have one number of heads, one intermediate size and one number of experts, so every block keeps the same
numbers; which heads, channels and experts those are is for the survey to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from compress.models.layers.base import Sublayer
from compress.models.layers.mlp import LEAVES
from compress.models.layers.moe import MoE
from compress.models.spec import ModelSpec
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions

MULTIPLE_AT_MOST = 256  # no format here has longer blocks
MULTIPLES_AT_LEAST = 64  # steps in which a wide feed-forward shrinks, so that a ratio is met to a percent
MULTIPLE_AT_LEAST = 8  # channels: rows of experts must be multiples of 16 bytes for grouped products
BUDGET_SLACK = 0.005  # of the matrices: shapes that miss a ratio by no more are as good as each other


@dataclass(frozen=True)
class Reduction:
    """dropped: layers that go; all others: what every layer keeps, as counted by the fields of ModelSpec."""

    dropped: int
    experts: int
    kv_heads: int
    intermediate: int
    moe_intermediate: int
    shared_intermediate: int


@dataclass(frozen=True)
class Cuts:
    """The steps that make a model smaller, and what they may leave of it: some of their `candidates`, by default all."""

    drop: DropLayersOptions | None = None
    experts: PruneExpertsOptions | None = None
    structured: PruneStructuredOptions | None = None
    shapes: Sequence[Reduction] = ()


def likeliest(
    spec: ModelSpec, shapes: Sequence[Reduction], structured: PruneStructuredOptions | None = None
) -> Reduction:
    """The shape of `candidates` that a plan counts with before scores are known: heads go in proportion, if at all."""
    wanted = spec.kv_heads * (1.0 - ((structured.ratio if structured else None) or 0.0))
    return min(shapes, key=lambda shape: (abs(shape.kv_heads - wanted), -shape.kv_heads))


def candidates(
    spec: ModelSpec,
    drop: DropLayersOptions | None = None,
    experts: PruneExpertsOptions | None = None,
    structured: PruneStructuredOptions | None = None,
) -> tuple[Reduction, ...]:
    """Every shape that the steps may leave, fewest heads first; scores say which.

    More than one only where `structured` has a ratio: of the parameters of the matrices in the layers and experts that
    the other steps leave. What a number of heads does not take of it, channels do, as far as their multiples allow; of
    the shapes that come out, those within BUDGET_SLACK of the ratio, else the nearest, so that all have about the same size.
    None where the ratio takes less than one step, or more than there is.
    """
    before = _whole(spec, drop, experts)
    if structured is None:
        return (before,)
    if structured.ratio is None:
        kv_heads = spec.kv_heads - rounded((structured.heads or 0.0) * spec.kv_heads)
        shares = {kv_heads: structured.channels or 0.0}
    else:
        group, ffn, fixed = _matrix_parameters(spec, before)
        budget = structured.ratio * (group * spec.kv_heads + ffn + fixed)
        least = spec.kv_heads if spec.family.fixed_heads else 1
        shares = {n: (budget - group * (spec.kv_heads - n)) / ffn for n in range(least, spec.kv_heads + 1)}
    most = min(1 - multiple_for(width, structured) / width for width in widths_of(spec).values())
    narrowed = (
        _narrowed(spec, before, n, share, structured)
        for n, share in shares.items()
        if n > 0 and _loads(spec, n) and -1e-9 < share < most + 1e-9
    )
    shapes, ratio = tuple(shape for shape in narrowed if shape != before), structured.ratio
    if ratio is None or not shapes:
        return shapes

    def missed(shape: Reduction) -> float:
        return abs(_share_gone(spec, before, shape) - ratio)

    near = tuple(shape for shape in shapes if missed(shape) <= BUDGET_SLACK)
    return near or (min(shapes, key=lambda shape: (missed(shape), -shape.kv_heads)),)


def _first(kinds: Any, layers: int) -> Any:
    return kinds[:layers] if isinstance(kinds, list) else kinds


def _below(numbers: Any, layers: int) -> Any:
    return [n for n in numbers if not isinstance(n, int) or n < layers] if isinstance(numbers, list) else numbers


def _at_most(number: Any, layers: int) -> Any:
    return min(number, layers) if isinstance(number, int) else number


_PER_LAYER = {"layer_types": _first, "max_window_layers": _at_most, "mlp_only_layers": _below}
"""Keys that go by layers, and what a model of fewer has for them; a family that does not read one has not checked it."""


def reduced(spec: ModelSpec, reduction: Reduction) -> ModelSpec:
    """The model that is left; its `config` is a stock config.json of the same family."""
    config = dict(spec.config)
    if reduction.dropped:
        layers = config["num_hidden_layers"] = spec.layers - reduction.dropped
        config |= {
            key: change(config[key], layers) for key, change in _PER_LAYER.items() if config.get(key) is not None
        }
    if reduction.experts != spec.experts:
        names = spec.family.experts_key
        present = [n for n in names if config.get(n)] or [n for n in names if n in spec.family.defaults]
        config |= dict.fromkeys(present, reduction.experts)
    if reduction.kv_heads != spec.kv_heads:
        config["num_attention_heads"] = spec.heads // spec.kv_heads * reduction.kv_heads
        config["num_key_value_heads"] = reduction.kv_heads
        config["head_dim"] = spec.head_dim
    if reduction.intermediate != spec.intermediate_size:
        config["intermediate_size"] = reduction.intermediate
    if reduction.moe_intermediate != spec.moe_intermediate_size and _has_own_expert_width(spec):
        config["moe_intermediate_size"] = reduction.moe_intermediate
    if reduction.shared_intermediate != spec.shared_intermediate_size:
        config[spec.family.shared_key] = reduction.shared_intermediate
    return spec.like(config)


def reduction_problems(
    spec: ModelSpec,
    drop: DropLayersOptions | None = None,
    experts: PruneExpertsOptions | None = None,
    structured: PruneStructuredOptions | None = None,
) -> list[str]:
    """Why the steps cannot be carried out on this model, one line each with what to do; empty when they can."""
    problems = _drop_problems(spec, drop) if drop else []
    problems += _expert_problems(spec, experts) if experts else []
    if structured is None:
        return problems
    before = (None, None) if problems else (drop, experts)
    return problems + _structured_problems(spec, *before, structured)


def channels_only(
    spec: ModelSpec,
    drop: DropLayersOptions | None,
    experts: PruneExpertsOptions | None,
    structured: PruneStructuredOptions,
) -> PruneStructuredOptions:
    """The step with the same budget, paid for by channels alone, for engines that take no other number of heads."""
    group, ffn, fixed = _matrix_parameters(spec, _whole(spec, drop, experts))
    if structured.ratio is None or ffn <= 0:
        return structured
    share = min(structured.ratio * (group * spec.kv_heads + ffn + fixed) / ffn, 0.99)
    return structured.model_copy(update={"ratio": None, "heads": 0.0, "channels": share})


def multiple_for(width: int, structured: PruneStructuredOptions) -> int:
    """The number whose multiples a feed-forward of `width` channels may keep."""
    if structured.multiple_of is not None:
        return structured.multiple_of
    multiple = 1
    most = max(MULTIPLE_AT_LEAST, min(MULTIPLE_AT_MOST, width // MULTIPLES_AT_LEAST))
    while 2 * multiple <= most and width % (2 * multiple) == 0:
        multiple *= 2
    return multiple


def rounded(value: float) -> int:
    """To the nearest integer, halves up."""
    return int(value + 0.5)


def _dropped(spec: ModelSpec, drop: DropLayersOptions | None) -> int:
    if drop is None:
        return 0
    return drop.count if drop.count is not None else rounded((drop.ratio or 0.0) * spec.layers)


def _whole(spec: ModelSpec, drop: DropLayersOptions | None, experts: PruneExpertsOptions | None) -> Reduction:
    """What layers and experts leave, its blocks as wide as before."""
    left = spec.experts - (rounded(experts.ratio * spec.experts) if experts else 0)
    widths = (spec.intermediate_size, spec.moe_intermediate_size, spec.shared_intermediate_size)
    return Reduction(_dropped(spec, drop), left, spec.kv_heads, *widths)


def _narrowed(
    spec: ModelSpec, before: Reduction, kv_heads: int, share: float, structured: PruneStructuredOptions
) -> Reduction:
    """`before` with so many key-value heads and less by a share of all channels."""
    widths = {name: _kept(width, share, structured) for name, width in widths_of(spec).items()}
    return replace(before, kv_heads=kv_heads, **widths)


def widths_of(spec: ModelSpec) -> dict[str, int]:
    """The widths of the model's feed-forwards, by the fields of Reduction."""
    widths = {}
    if spec.intermediate_size and (len(spec.sparse_layers) < spec.layers or not _has_own_expert_width(spec)):
        widths["intermediate"] = spec.intermediate_size
    if spec.sparse_layers or not _has_own_expert_width(spec):
        widths["moe_intermediate"] = spec.moe_intermediate_size
    if spec.sparse_layers and spec.shared_intermediate_size:
        widths["shared_intermediate"] = spec.shared_intermediate_size
    return widths


def _matrix_parameters(spec: ModelSpec, before: Reduction) -> tuple[int, int, int]:
    """Weights of all blocks' matrices: those that belong to one key-value head and the query heads that read it (rows of
    q, k and v, columns of o), those of the feed-forwards, and those of mixers that cannot lose heads."""
    layers = spec.layers - before.dropped
    of_heads = fixed = 0
    for mixer, count in Counter(s for block in spec.blocks for s in block if s.half == "attention").items():
        for weight in mixer.weights:
            if weight.input is None or len(weight.shape) != 2:
                continue
            if not spec.family.fixed_heads and any(axis and axis.of == "kv_heads" for axis in weight.axes):
                of_heads += count * prod(weight.shape)
            else:
                fixed += count * prod(weight.shape)
    routed = before.experts * spec.moe_intermediate_size + spec.shared_intermediate_size
    ffn = spec.hidden_size * sum(
        _matrices(half) * (routed if isinstance(half, MoE) else spec.intermediate_size)
        for block in spec.blocks
        for half in block
        if half.half == "ffn"
    )
    return (
        layers * of_heads // (spec.layers * spec.kv_heads),
        layers * ffn // spec.layers,
        layers * fixed // spec.layers,
    )


def _matrices(feed_forward: Sublayer) -> int:
    """How many a feed-forward has for each of its channels: gate, up and down, or two of them."""
    return len(getattr(feed_forward, "leaves", LEAVES))


def _share_gone(spec: ModelSpec, before: Reduction, after: Reduction) -> float:
    """Share of the matrices' parameters that goes from one shape to the other."""
    left = []
    for shape in (before, after):
        widths = replace(
            spec,
            intermediate_size=shape.intermediate,
            moe_intermediate_size=shape.moe_intermediate,
            shared_intermediate_size=shape.shared_intermediate,
        )
        group, ffn, fixed = _matrix_parameters(widths, shape)
        left.append(group * shape.kv_heads + ffn + fixed)
    return 1 - left[1] / left[0]


def _kept(width: int, share: float, structured: PruneStructuredOptions) -> int:
    """Channels that stay of `width` when about `share` of them go: a multiple, at least one."""
    if share < 1e-9:
        return width
    multiple = multiple_for(width, structured)
    return min(width, multiple * max(1, rounded(width * (1.0 - share) / multiple)))


def _loads(spec: ModelSpec, kv_heads: int) -> bool:
    """Whether transformers takes a configuration of this family with so many heads."""
    heads = spec.heads // spec.kv_heads * kv_heads
    return not spec.family.heads_divide_width or spec.hidden_size % heads == 0


def _has_own_expert_width(spec: ModelSpec) -> bool:
    """Whether experts' channels are counted by a key of their own; Mixtral's are the intermediate size."""
    key = "moe_intermediate_size"
    return bool(spec.config.get(key) or spec.family.defaults.get(key))


def _drop_problems(spec: ModelSpec, drop: DropLayersOptions) -> list[str]:
    count = _dropped(spec, drop)
    if not count:
        return [f"drop_layers: ratio {drop.ratio:g} removes none of {spec.layers} layers; give count: 1"]
    if count >= spec.layers:
        return [f"drop_layers: cannot drop {count} of {spec.layers} layers; keep at least one"]
    if 0 < len(spec.sparse_layers) < spec.layers:
        return [
            "drop_layers: this model has dense layers and layers with experts, and config.json cannot say which are left; "
            "prune experts or channels instead"
        ]
    if len({block[0] for block in spec.blocks}) > 1:
        kinds = len({type(block[0]) for block in spec.blocks})
        some = (
            "mix tokens in another way than others"
            if kinds > 1
            else "attend through a sliding window, or with positions, and some do not"
        )
        return [
            f"drop_layers: some layers of this model {some}, and which are left is "
            "not known before the text is read; prune heads or channels instead"
        ]
    return []


def _expert_problems(spec: ModelSpec, experts: PruneExpertsOptions) -> list[str]:
    if not spec.sparse_layers:
        return ["prune_experts: this model has no routed experts; use prune_structured or drop_layers"]
    if any(s.router.groups > 1 for block in spec.blocks for s in block if isinstance(s, MoE)):
        return [
            "prune_experts: this model chooses experts by groups of equal size, and which are left differs; "
            "prune single weights or quantize the experts to fewer bits instead"
        ]
    gone = rounded(experts.ratio * spec.experts)
    if not gone:
        least = 1 / spec.experts
        return [
            f"prune_experts: ratio {experts.ratio:g} removes none of {spec.experts} experts; use {least:.3g} or more"
        ]
    if spec.experts - gone < spec.experts_per_token:
        most = 1 - spec.experts_per_token / spec.experts
        return [
            f"prune_experts: ratio {experts.ratio:g} leaves {spec.experts - gone} experts of {spec.experts}, but every token "
            f"needs {spec.experts_per_token}; use {most:.3g} or less"
        ]
    return []


def _structured_problems(
    spec: ModelSpec,
    drop: DropLayersOptions | None,
    experts: PruneExpertsOptions | None,
    structured: PruneStructuredOptions,
) -> list[str]:
    if spec.family.fixed_channels:
        return [
            f"prune_structured: {spec.family.fixed_channels}; prune single weights or quantize to fewer bits instead"
        ]
    if structured.heads and spec.family.fixed_heads:
        return [f"prune_structured: {spec.family.fixed_heads}; leave heads out"]
    widths = widths_of(spec).values()
    if structured.multiple_of is not None and structured.multiple_of > min(widths):
        return [
            f"prune_structured: a feed-forward of this model has {min(widths)} channels, fewer than multiple_of: "
            f"{structured.multiple_of}; use less or leave it out"
        ]
    if problems := _head_problems(spec, structured):
        return problems
    shapes = candidates(spec, drop, experts, structured)
    if spec.sparse_layers and (odd := [s.moe_intermediate for s in shapes if s.moe_intermediate % MULTIPLE_AT_LEAST]):
        return [
            f"prune_structured: experts of {odd[0]} channels are left, and transformers multiplies those in multiples of "
            f"{MULTIPLE_AT_LEAST} only; use another ratio, or multiple_of: {MULTIPLE_AT_LEAST}"
        ]
    narrowed = any(getattr(shape, name) < width for shape in shapes for name, width in widths_of(spec).items())
    if narrowed or (shapes and not structured.channels):
        return []
    asked = f"channels: {structured.channels or 0:g}" if structured.ratio is None else f"ratio: {structured.ratio:g}"
    steps = max(multiple_for(width, structured) / width for width in widths)
    if (structured.channels or structured.ratio or 0.0) < 0.5:
        return [
            f"prune_structured: {asked} takes less than one step of {steps:.3g}; use more, or a smaller multiple_of"
        ]
    return [f"prune_structured: {asked} takes more than can go; use less, or a smaller multiple_of"]


def _head_problems(spec: ModelSpec, structured: PruneStructuredOptions) -> list[str]:
    if not structured.heads:
        return []
    groups, asked = spec.kv_heads - rounded(structured.heads * spec.kv_heads), f"heads: {structured.heads:g}"
    if groups == spec.kv_heads:
        return [
            f"prune_structured: {asked} removes none of {spec.kv_heads} groups of heads; "
            f"use {1 / spec.kv_heads:.3g} or more, or leave it out"
        ]
    if groups < 1:
        return [f"prune_structured: {asked} removes all {spec.kv_heads} groups of heads; use less"]
    if not _loads(spec, groups):
        shares = [f"{1 - n / spec.kv_heads:.3g}" for n in range(spec.kv_heads - 1, 0, -1) if _loads(spec, n)]
        return [
            f"prune_structured: {spec.heads // spec.kv_heads * groups} heads do not divide hidden_size "
            f"({spec.hidden_size}), and transformers wants that of {spec.model_type} models; "
            + (f"heads can be {', '.join(shares)}" if shares else "leave heads out")
        ]
    return []
