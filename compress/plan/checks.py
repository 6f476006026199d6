"""Why a recipe cannot be carried out on a model: every check of `plan` that ends in a line for the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.codecs.names import SPARSE_VALUES, codec_info, ggml_fallback
from compress.containers import CONTAINERS, Container, activation_problem, incoherence_problem
from compress.models.layers import rope
from compress.models.spec import ModelSpec
from compress.plan.causes import Problem, of_step, problem_of, unfit
from compress.plan.factors import KNAPSACK_SHARES
from compress.recipe.schema import STEP_ORDER, Factorize, Prune, Recipe
from compress.text import load_suite, text_set
from compress.transforms.options import TransformOptions

if TYPE_CHECKING:
    from compress.plan.tensor import PlannedTensor


def container_problems(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """What a container cannot say about this model, whatever its weights."""
    containers = (CONTAINERS[export.container] for export in recipe.export)
    return [f"{container.name}: {reason}" for container in containers for reason in container.unrepresentable(spec)]


def text_problems(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """Texts and limits that do not go with the model."""
    problems = []
    kind = (spec.rope_scaling or {}).get("rope_type", (spec.rope_scaling or {}).get("type", "default"))
    if kind not in rope.TYPES:
        problems.append(f"rope scaling {kind!r} is not supported; supported: {', '.join(rope.TYPES)}")
    calibration = recipe.calibration
    text_set(calibration.source)
    if calibration.length > spec.max_positions:
        problems.append(
            f"calibration.length {calibration.length} is longer than the model's limit of "
            f"{spec.max_positions} positions; lower calibration.length"
        )
    if recipe.score is not None:
        suite = load_suite(recipe.score.suite)
        problems += [
            f"suite {suite.name} scores windows of {text.protocol.length} tokens of {text.text}, the model allows "
            f"{spec.max_positions}; choose another suite or score: false"
            for text in suite.texts.values()
            if text.protocol.length > spec.max_positions
        ]
    elif recipe.gate.max_kld is not None or recipe.gate.max_perplexity_ratio is not None:
        problems.append("gate: its limits need scores, and score is false; set a suite or drop the limits")
    return problems


def stream_problems(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """Rotations of a residual stream that cannot be turned."""
    rotate = recipe.step("rotate")
    if rotate is None or "R1" not in rotate.kinds or not spec.fixed_stream:
        return []
    return [f"rotate: {spec.fixed_stream}, so that R1 cannot turn it; set kinds: [R2], or drop the step"]


def step_problems(recipe: Recipe) -> list[str]:
    """Steps that are there twice, in the wrong order, or without what they work on."""
    kinds = [step.kind for step in recipe.steps]
    problems = []
    if kinds.count("quantize") > 1:
        problems.append("more than one quantize step: a tensor can be quantized once; put all rules in one step")
    problems += [f"more than one {k} step" for k in dict.fromkeys(kinds) if k != "quantize" and kinds.count(k) > 1]
    ranks = [STEP_ORDER.index(kind) for kind in kinds]
    if ranks != sorted(ranks):
        wanted = ", ".join(sorted(dict.fromkeys(kinds), key=STEP_ORDER.index))
        problems.append(f"steps: this order makes no sense, write them as {wanted}")
    if "recover" in kinds and "quantize" not in kinds:
        problems.append("steps: recover repairs what quantize did; add a quantize step before it")
    quantize = recipe.step("quantize")
    if "recover" in kinds and quantize is not None and quantize.inputs == "original":
        problems.append("steps: recover compares with the compressed model's own inputs; drop inputs: original")
    problems += [
        f"steps: {step.options.name} scales for what quantize rounds; add a quantize step behind it"
        for step in recipe.steps
        if isinstance(step.options, TransformOptions) and "quantize" not in kinds
    ]
    if "factorize" in kinds:
        problems += [
            f"export: container {e.container} holds no factors; use "
            f"{' or '.join(c.name for c in CONTAINERS.values() if 'factors' in c.kinds)}"
            for e in recipe.export
            if "factors" not in CONTAINERS[e.container].kinds
        ]
    return problems + prune_problems(recipe.step("prune")) + factorize_problems(recipe.step("factorize"))


def prune_problems(prune: Prune | None) -> list[str]:
    """What the options of a prune step say against each other."""
    if prune is None:
        return []
    problems = []
    grouped = [p for p in (prune.sparsity, *(rule.sparsity for rule in prune.rules)) if p is not None and p.of]
    if prune.allocation == "outliers" and grouped:
        problems.append(
            f"prune: allocation: outliers moves shares, and {grouped[0]} is fixed; give shares or drop allocation"
        )
    if prune.allocation == "uniform" and prune.spread != Prune.model_fields["spread"].default:
        problems.append("prune: spread goes with allocation: outliers")
    return problems


def factorize_problems(factorize: Factorize | None) -> list[str]:
    """What the options of a factorize step say against each other; budgets that no allocation can meet."""
    if factorize is None:
        return []
    problems, fields = [], Factorize.model_fields
    guarded = factorize.allocation == "pooled"
    if not guarded and (factorize.low, factorize.high) != (fields["low"].default, fields["high"].default):
        problems.append("factorize: low and high are guards of allocation: pooled")
    least = {"pooled": factorize.low, "knapsack": min(KNAPSACK_SHARES)}.get(factorize.allocation, 0.0)
    for ratio in dict.fromkeys(
        r for r in (factorize.ratio, *(rule.ratio for rule in factorize.rules)) if r is not None
    ):
        if 1 - ratio < least - 1e-9 or (guarded and 1 - ratio > factorize.high):
            bounds = f"{least:g} to {factorize.high:g}" if guarded else f"{least:g} or more"
            problems.append(
                f"factorize: ratio {ratio:g} keeps {1 - ratio:.3g} of the bytes, allocation: {factorize.allocation} gives a "
                f"matrix {bounds}; change the ratio{', low or high' if guarded else ' or the allocation'}"
            )
    return problems


def narrow_calibration(recipe: Recipe) -> list[str]:
    """A line where experts are ranked by text of one source: those of other domains look idle there and go."""
    if recipe.step("prune_experts") is None:
        return []
    source = recipe.calibration.source
    if len(text_set(source).mix) > 1:
        return []
    return [
        f"prune_experts ranks experts by {source.label} alone, one source: experts that only code, chat or other "
        "languages use look idle there and go; name a calibration set that mixes what the model is for"
    ]


def tensor_problems(planned: PlannedTensor, containers: Sequence[Container]) -> list[Problem]:
    """Why a tensor cannot be stored as planned."""
    info, shape = codec_info(planned.values or planned.codec), planned.spec.shape
    problems = shrinking_problems(planned)
    if info.kind == "uniform" and info.block and shape[-1] % info.block:
        problems.append(unfit(planned, f"rows of {shape[-1]} do not divide into groups of {info.block}"))
    elif info.kind == "ggml" and ggml_fallback(info.name, shape[-1]):
        problems.append(unfit(planned, f"rows of {shape[-1]} do not divide into {info.name} blocks"))
    elif info.kind in ("bnb", "vector", "block") and shape[-1] % info.block:
        problems.append(unfit(planned, f"rows of {shape[-1]} do not divide into {info.name}'s {info.block} columns"))
    elif len(shape) > 1 and shape[-2] % info.rows:
        problems.append(unfit(planned, f"{info.name} codes {info.rows} rows together, this has {shape[-2]}"))
    told = []
    if planned.activations and planned.spec.role == "embeddings":
        told.append("embeddings are looked up and have no inputs to round; drop activations for them")
    if planned.ordered and (others := sorted(c.name for c in containers if not (c.pieces or c.dense))):
        pieces = next(c.name for c in containers if c.pieces)
        told.append(
            f"{pieces} wants its columns in another order than {others[0]} does, and blocks follow the columns; "
            "give each container a recipe of its own"
        )
    for container in sorted(containers, key=lambda c: c.name):
        if planned.incoherence and (why := incoherence_problem(container)):
            told.append(why)
        if planned.activations and (why := activation_problem(container)):
            told.append(why)
    return problems + [problem_of(planned, why) for why in told]


def shrinking_problems(planned: PlannedTensor) -> list[Problem]:
    """Why a tensor cannot be pruned or factorised as planned."""
    if planned.pruner is None and planned.factorizer is None:
        return []
    role, values = planned.spec.role, planned.values
    step = "prune" if planned.pruner is not None else "factorize"
    told, problems = [], []
    if role == "embeddings":
        told.append(f"{step}: embeddings are looked up and have no inputs to weigh them by; take them off the targets")
    if codec_info(values).kind not in SPARSE_VALUES:
        told.append(
            f"{step}: {planned.wanted or values} goes with neither masks nor factors; use an intN codec or a float, or "
            "make the model smaller with prune_experts, prune_structured or drop_layers, which go with every codec"
        )
    if planned.factorizer is not None and planned.activations:
        told.append(f"{step}: inputs of factors are not rounded; drop activations for them")
    if planned.incoherence:
        told.append(f"{step}: incoherence mixes the columns, where masks have no meaning; drop it")
    if planned.pattern is not None and planned.pattern.of and planned.spec.shape[-1] % planned.pattern.of:
        why = f"rows of {planned.spec.shape[-1]} do not divide into groups of {planned.pattern.of} columns"
        problems.append(problem_of(planned, f"{why} for {planned.pattern}; give it a share instead"))
    return [of_step(why) for why in told] + problems
