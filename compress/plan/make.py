"""Recipe + model -> Plan: a recipe proved legal for its model, in one pass over the model's tensors. No weights, no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.codecs.names import codec_info
from compress.errors import OutputError, PlanError, UnsupportedModel
from compress.models.checkpoint import Checkpoint, checkpoint_problems, named_codec, own_codec
from compress.models.companions import left_behind
from compress.models.identity import identify
from compress.models.locate import model_location
from compress.models.spec import ModelSpec, load_spec
from compress.models.surplus import Surplus, surplus
from compress.plan.beside import Along, going_along
from compress.plan.checks import container_problems, narrow_calibration, step_problems, stream_problems, text_problems
from compress.plan.outline import Outline
from compress.plan.plan import Plan
from compress.plan.planner import Planner
from compress.plan.reference import Reference, open_reference
from compress.plan.savings import STRUCTURAL, Saving, shrinking, structural
from compress.plan.texts import choose_text
from compress.reading import shortened
from compress.recipe.schema import Recipe
from compress.structured.shapes import Reduction, candidates, channels_only, likeliest, reduced, reduction_problems


def make_plan(recipe: Recipe, *, weights: bool = False, spec: ModelSpec | None = None) -> Plan:
    """Prove a recipe legal for its model.

    weights=True demands the weight files; where they are, every tensor must be in them with the shape that the config
    implies, and no other. spec: the model that a survey has left of it, where a step changes its shape.
    Raises PlanError with all problems, UnsupportedModel, CheckpointError or CalibrationError.
    """
    checkpoint = Checkpoint.open(model_location(recipe.model), weights=weights, adapter=recipe.adapter)
    recipe, chosen = choose_text(recipe, checkpoint.folder)
    original = load_spec(checkpoint.config)
    if checkpoint.unread:
        raise UnsupportedModel(f"{recipe.model} {checkpoint.unread}")
    own = own_codec(original, checkpoint)
    original, found, along = _beside(recipe, original, checkpoint)
    turned = replace(original.untied() if recipe.step("rotate") else original, beside=along.kept)
    problems = [*_problems(recipe, original), *along.problems]
    steps = cuts(recipe, turned).values()
    problems += reduction_problems(turned, *steps) if any(steps) else container_problems(recipe, turned)
    if problems:
        raise PlanError(problems)
    planner = Planner(recipe, checkpoint, own)
    spec, shapes = _shape(planner, turned) if spec is None else (spec, ())
    decided = planner.decide(replace(spec, beside=along.kept))
    outline, problems = decided.outline, list(decided.problems)
    if checkpoint.entries:
        problems += found.problems + checkpoint_problems(original, checkpoint)
    problems += _storage_problems(recipe, outline)
    if problems := list(dict.fromkeys(problems)):
        raise PlanError(shortened(problems))
    savings = _structural_savings(planner, turned)
    savings += shrinking(outline, recipe.containers, own)
    warnings = [f"rule matches no tensor of this model: {rule}" for rule in decided.unused]
    warnings += _warnings(recipe, original, outline, own) + [str(line) for line in savings if line.nothing]
    warnings += [*along.lines, *narrow_calibration(recipe), *found.lines, *_folder_notes(checkpoint, own)]
    base = None if recipe.score is None else recipe.score.base
    reference = None if base is None else open_reference(base, original, weights=weights)
    warnings += _compared(recipe, checkpoint, reference)
    files = [(file.name, file.stat()) for file in checkpoint.deciding]
    plan = Plan(
        recipe=recipe,
        original=original,
        outline=outline,
        source=checkpoint.folder,
        identity=identify(model_location(recipe.model), checkpoint.folder),
        warnings=tuple(warnings),
        exchanges=decided.exchanges,
        source_bytes=sum(stat.st_size for _, stat in files) or 2 * original.parameters,
        own_codec=own,
        stamp=tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)),
        doubts=tuple(found.lines),
        savings=savings,
        shapes=shapes,
        base=reference,
        place=checkpoint.place,
    )
    return plan.saying((chosen,)) if chosen is not None and plan.needs_calibration else plan


def _compared(recipe: Recipe, checkpoint: Checkpoint, reference: Reference | None) -> list[str]:
    """What scores compare with, where that is not plain."""
    if reference is not None:
        return [f"scores compare with {reference.name}", *(f"{reference.name}: {line}" for line in reference.notes)]
    if recipe.score is None or not any(entry.quantized for entry in checkpoint.entries.values()):
        return []
    return ["scores compare with the decoded weights; --base MODEL compares with the model before it was quantized"]


def _problems(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """What is wrong with a recipe for a model, whatever its weights."""
    return step_problems(recipe) + text_problems(recipe, spec) + stream_problems(recipe, spec)


def _beside(recipe: Recipe, spec: ModelSpec, checkpoint: Checkpoint) -> tuple[ModelSpec, Surplus, Along]:
    """The model with what its checkpoint holds beside the decoder, and what becomes of that."""
    found = surplus(spec, checkpoint) if checkpoint.entries else Surplus()
    spec = replace(spec, beside=found.beside)
    return spec, found, going_along(recipe, spec, bool(checkpoint.entries))


def _folder_notes(checkpoint: Checkpoint, own: str) -> list[str]:
    """What reading it told; lines where config.json names another float type than the tensors have, and where files go into
    no artifact."""
    notes = [*checkpoint.notes]
    if (named := named_codec(checkpoint.config) or own) != own:
        notes.append(f"config.json says {named}, the tensors are {own}: floats are stored as {own}")
    if names := left_behind(checkpoint.folder):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        notes.append(f"files of the model's folder that no artifact takes along: {', '.join(names[:4])}{more}")
    return notes


def _shape(planner: Planner, spec: ModelSpec) -> tuple[ModelSpec, tuple[Reduction, ...]]:
    """The model that steps leave of `spec`, as far as that is known, and every shape of it that can be stored: a survey
    chooses among these. Where none can, the likeliest, for its problems to be told."""
    recipe = planner.recipe
    steps = cuts(recipe, spec)
    if not any(steps.values()):
        return spec, ()

    def legal(shape: Reduction) -> bool:
        decided = planner.decide(reduced(spec, shape))
        return decided.sound and not _storage_problems(recipe, decided.outline)

    found = candidates(spec, *steps.values())
    shapes = tuple(shape for shape in found if legal(shape)) if len(found) > 1 else found
    return reduced(spec, likeliest(spec, shapes or found, steps["prune_structured"])), shapes


def _storage_problems(recipe: Recipe, outline: Outline) -> list[str]:
    """Why a container cannot hold a model or its tensors as planned."""
    problems = container_problems(recipe, outline.spec)
    tensors = [t for t, _ in outline.counted]
    for container in sorted(recipe.containers, key=lambda c: c.name):
        try:
            container.check_plan(outline.spec, [t for t in tensors if container.has_place(t.spec)])
        except OutputError as error:
            problems.append(f"{container.name}: {error}")
    return problems


def cuts(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """The options of the steps that change the shape of `spec`, by kind, None for those the recipe does not have."""
    steps = {kind: recipe.step(kind) for kind in STRUCTURAL}
    if steps["prune_structured"] is not None and _heads_stay(recipe, spec):
        steps["prune_structured"] = channels_only(spec, *steps.values())
    return steps


def _heads_stay(recipe: Recipe, spec: ModelSpec) -> str | None:
    """Why no head can go, or None."""
    engines = (why for container in recipe.containers if (why := container.heads_stay(spec)))
    return spec.family.fixed_heads or next(engines, None)


def _structural_savings(planner: Planner, spec: ModelSpec) -> tuple[Saving, ...]:
    """What the steps save that leave a model of another shape, in the codecs of the recipe."""
    recipe = planner.recipe
    wanted = cuts(recipe, spec)
    if not any(wanted.values()):
        return ()
    steps: dict[str, Any] = dict.fromkeys(STRUCTURAL)
    chain = [("", planner.decide(spec).outline)]
    for kind, options in wanted.items():
        if options is not None:
            steps[kind] = options
            found = candidates(spec, *steps.values())
            left = reduced(spec, likeliest(spec, found, steps["prune_structured"]))
            chain.append((kind, planner.decide(left).outline))
    return structural(chain, recipe.containers, planner.own)


def _warnings(recipe: Recipe, original: ModelSpec, outline: Outline, own: str) -> list[str]:
    """What users should know before they start."""
    spec = outline.spec
    warnings = [line for container in recipe.containers for line in container.caveats(spec)]
    structured = recipe.step("prune_structured")
    if structured is not None and structured.ratio is not None and (why := _heads_stay(recipe, spec)):
        warnings.append(f"{why}: heads stay, channels alone make up the {structured.ratio:.0%} of prune_structured")
    if original.tied and not spec.tied:
        warnings.append("rotate unties the head from the embeddings: both are stored")
    if any(codec_info(t.codec).kind != "float" for t, _ in outline.counted):
        warnings += [
            f"{container.name} is dense: decoded weights are rounded to the checkpoint's own type ({own})"
            for container in recipe.containers
            if container.dense
        ]
    return warnings
