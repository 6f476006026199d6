"""Recipe + model -> Plan: what happens to every tensor, proved legal, with sizes and memory. No weights, no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compress import __version__, plugins
from compress.codecs.names import codec_info
from compress.containers import Container, packed_layout
from compress.errors import OutputError, PlanError, UnsupportedModel
from compress.models.checkpoint import FLOAT_CODEC, Checkpoint, checkpoint_problems
from compress.models.locate import model_location
from compress.models.spec import ModelSpec, TensorSpec, load_spec
from compress.plan import resources as footprint
from compress.plan.checks import (
    container_problems,
    narrow_calibration,
    step_problems,
    tensor_problems,
    text_problems,
)
from compress.plan.savings import STRUCTURAL, Saving, shrinking, structural
from compress.plan.tensor import PlannedTensor, Rules, factored, in_pieces, planned_tensor, precise_float, pruned
from compress.recipe.rules import FLOAT_ROLES
from compress.recipe.schema import Recipe
from compress.solvers.options import RecoverOptions
from compress.structured.shapes import Reduction, candidates, channels_only, likeliest, reduced, reduction_problems
from compress.transforms.options import RotateOptions, TransformOptions
from compress.weights import Pattern

MATCHING = ("quantize", "prune", "factorize")  # steps whose rules decide tensor by tensor


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, before it does anything.

    `spec` is the model that is compressed: the original, or what rotations and steps that change its shape make of it.
    """

    recipe: Recipe
    original: ModelSpec
    spec: ModelSpec
    source: Path
    tensors: tuple[PlannedTensor, ...]
    warnings: tuple[str, ...]
    source_bytes: int
    own_codec: str = "bf16"
    """The checkpoint's own float type."""
    stamp: tuple[tuple[str, int, int], ...] = ()
    """Name, size and modification time of the weight files, so that a changed checkpoint does not resume."""
    savings: tuple[Saving, ...] = ()
    """What steps that make the model smaller save, in every container."""
    shapes: tuple[Reduction, ...] = ()
    """Where steps change the model's shape: those that a survey may choose, all of about the same size."""

    @property
    def turned(self) -> ModelSpec:
        """The model that steps which change its shape start from: the original, with a head of its own once rotated."""
        return self.original.untied() if self.rotation is not None else self.original

    @property
    def rotation(self) -> RotateOptions | None:
        """How the model is turned before anything else."""
        return self.recipe.step("rotate")

    @property
    def transforms(self) -> tuple[TransformOptions, ...]:
        """The scalings of every block, in order."""
        return tuple(step.options for step in self.recipe.steps if step.kind in ("awq", "smooth"))

    @property
    def recover(self) -> RecoverOptions | None:
        """How floats are tuned once a block's codes are known."""
        return self.recipe.step("recover")

    @property
    def two_streams(self) -> bool:
        """Whether the original's activations are carried along."""
        drifts = any(t.asks.drift or t.asks.residual for t in self.tensors)
        return self.solves and (drifts or self.recover is not None)

    @cached_property
    def by_name(self) -> Mapping[str, PlannedTensor]:
        return {t.name: t for t in self.tensors}

    @property
    def parameters(self) -> int:
        return sum(t.spec.parameters for t in self.tensors)

    @cached_property
    def original_parameters(self) -> int:
        return sum(t.parameters for t in self.original.tensors())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the first container that stores codes, which adds its header and tokenizer."""
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for every weight of the original."""
        return 8.0 * self.bytes / self.original_parameters

    def settled(self, patterns: Mapping[str, Pattern], shares: Mapping[str, float]) -> Plan:
        """The plan once a survey has said, by tensor, which weights may stay and what share of its bytes factors take."""
        containers = self.recipe.containers

        def settle(planned: PlannedTensor) -> PlannedTensor:
            if planned.name in patterns:
                planned = pruned(planned, patterns[planned.name], containers)
            if planned.name in shares:
                planned = factored(planned, shares[planned.name])
            return replace(planned, bytes=_bytes(planned, self.recipe, self.own_codec))

        return replace(self, tensors=tuple(settle(t) for t in self.tensors))

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        return tuple(t for t in self.tensors if t.wanted is not None)

    @cached_property
    def digest(self) -> str:
        """sha256 of the recipe, this version and the config: what a journal must agree with to be resumed."""
        facts = {
            "recipe": self.recipe.digest(),
            "version": __version__,
            "config": dict(self.spec.config),
            "codecs": [t.codec for t in self.tensors],
            "weights": self.stamp,
            "plugins": plugins.digests(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def block(self, layer: int) -> tuple[PlannedTensor, ...]:
        return self.blocks[layer]

    @cached_property
    def blocks(self) -> tuple[tuple[PlannedTensor, ...], ...]:
        blocks: list[list[PlannedTensor]] = [[] for _ in range(self.spec.layers)]
        for tensor in self.tensors:
            if tensor.spec.layer is not None:
                blocks[tensor.spec.layer].append(tensor)
        return tuple(tuple(b) for b in blocks)

    @property
    def structural(self) -> bool:
        """Whether layers, experts, heads or channels go: the model that is compressed has another shape."""
        return any(self.recipe.step(kind) is not None for kind in STRUCTURAL)

    @property
    def open(self) -> tuple[str, ...]:
        """What the plan leaves to a survey of the model: "structure", "sparsity", "factors"."""
        prune, factorize = self.recipe.step("prune"), self.recipe.step("factorize")
        asked = {
            "structure": self.structural,
            "sparsity": prune is not None and prune.allocation != "uniform",
            "factors": factorize is not None and factorize.allocation != "uniform",
        }
        return tuple(what for what, yes in asked.items() if yes)

    @property
    def needs_calibration(self) -> bool:
        """Whether any text is read."""
        return self.solves or bool(set(self.open) - {"factors"})

    @property
    def solves(self) -> bool:
        """Whether activations go through the blocks while they are compressed."""
        return any(t.method is not None and t.spec.input is not None for t in self.tensors)

    @property
    def activation_bytes(self) -> int:
        """One copy of the calibration activations, float32, on disk."""
        if not self.needs_calibration:
            return 0
        return self.recipe.calibration.samples * self.recipe.calibration.length * self.spec.hidden_size * 4

    @property
    def disk_bytes(self) -> int:
        """What the work folder and the artifacts take while it runs."""
        return footprint.disk_bytes(self)

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Independent of the number of blocks."""
        return footprint.peak_memory_bytes(self)

    def as_dict(self) -> dict[str, Any]:
        """For --json: totals, then every tensor."""
        return {
            "model": self.recipe.model,
            "recipe": self.recipe.name,
            "digest": self.digest,
            "architecture": self.spec.model_type,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "source_bytes": self.source_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "containers": [e.container for e in self.recipe.export],
            "file_bytes": {c.name: footprint.file_bytes(self, c) for c in self.recipe.containers},
            "warnings": list(self.warnings),
            "savings": [{**asdict(line), "nothing": line.nothing} for line in self.savings],
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.spec.shape),
                    "role": t.spec.role,
                    "layer": t.spec.layer,
                    "steps": [s.kind for s in self.recipe.steps if _works_on(s.kind, t)],
                    "solver": t.label,
                    "codec": t.codec,
                    "wanted": t.wanted,
                    "incoherence": t.incoherence,
                    "activations": t.activations,
                    "sparsity": None if t.pattern is None else str(t.pattern),
                    "factors": t.factors,
                    "bytes": t.bytes,
                }
                for t in self.tensors
            ],
        }


def make_plan(recipe: Recipe, *, weights: bool = False, spec: ModelSpec | None = None) -> Plan:
    """Prove a recipe legal for its model.

    weights=True also demands that every tensor is in the checkpoint with the shape the config implies; spec: the model
    that a survey has left of it, where a step changes its shape.
    Raises PlanError with all problems, UnsupportedModel, CheckpointError or CalibrationError.
    """
    checkpoint = Checkpoint.open(model_location(recipe.model), weights=weights)
    original = load_spec(checkpoint.config)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UnsupportedModel(f"{recipe.model} is already quantized ({method}); give the original float checkpoint")
    turned = original.untied() if recipe.step("rotate") else original
    problems = step_problems(recipe) + text_problems(recipe, original)
    steps = cuts(recipe, turned).values()
    problems += reduction_problems(turned, *steps) if any(steps) else container_problems(recipe, turned)
    if problems:
        raise PlanError(problems)
    own = FLOAT_CODEC.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), "f16")
    shapes: tuple[Reduction, ...] = ()
    if spec is None:
        spec, shapes = _shape(recipe, turned, checkpoint, own)
    tensors, unused, problems = _plan_tensors(recipe, spec, checkpoint, own)
    if weights:
        problems += checkpoint_problems(original, checkpoint)
    problems += _storage_problems(recipe, spec, tensors)
    if problems := list(dict.fromkeys(problems)):
        raise PlanError(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
    tensors = [replace(t, bytes=_bytes(t, recipe, own)) for t in tensors]
    savings = _structural_savings(recipe, turned, checkpoint, own)
    savings += shrinking(tensors, recipe.containers, own)
    warnings = [f"rule matches no tensor of this model: {rule}" for rule in unused]
    warnings += _warnings(recipe, spec, original, tensors, own) + [str(line) for line in savings if line.nothing]
    warnings += narrow_calibration(recipe)
    source = sum(2 * t.parameters for t in original.tensors())
    if checkpoint.entries:
        source = sum(file.stat().st_size for file in {e.file for e in checkpoint.entries.values()})
    stamp = tuple(
        sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in {t.file for t in checkpoint.entries.values()})
    )
    return Plan(
        recipe, original, spec, checkpoint.folder, tuple(tensors), tuple(warnings), source, own, stamp, savings, shapes
    )


def _shape(
    recipe: Recipe, spec: ModelSpec, checkpoint: Checkpoint, own: str
) -> tuple[ModelSpec, tuple[Reduction, ...]]:
    """The model that steps leave of `spec`, as far as that is known, and every shape of it that can be stored: a survey
    chooses among these. Where none can, the likeliest, for its problems to be told."""
    steps = cuts(recipe, spec)
    if not any(steps.values()):
        return spec, ()

    def legal(shape: Reduction) -> bool:
        left = reduced(spec, shape)
        tensors, _, problems = _plan_tensors(recipe, left, checkpoint, own)
        return not problems and not _storage_problems(recipe, left, tensors)

    found = candidates(spec, *steps.values())
    shapes = tuple(shape for shape in found if legal(shape)) if len(found) > 1 else found
    return reduced(spec, likeliest(spec, shapes or found, steps["prune_structured"])), shapes


def _storage_problems(recipe: Recipe, spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> list[str]:
    """Why a container cannot hold a model or its tensors as planned."""
    problems = container_problems(recipe, spec)
    for container in sorted(recipe.containers, key=lambda c: c.name):
        try:
            container.check_plan(spec, tensors)
        except OutputError as error:
            problems.append(f"{container.name}: {error}")
    return problems


def _works_on(step: str, planned: PlannedTensor) -> bool:
    """Whether a kind of step changes this tensor's values."""
    own = {"prune": planned.pattern, "factorize": planned.factors}
    return planned.method is not None and (step not in own or own[step] is not None)


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


def _plan_tensors(
    recipe: Recipe, spec: ModelSpec, checkpoint: Checkpoint, own: str
) -> tuple[list[PlannedTensor], list[str], list[str]]:
    """Every tensor of a model, bytes not counted; rules of the recipe that match none; why some cannot be stored."""
    containers = recipe.containers
    matchers = {kind: step.matcher(spec) for kind in MATCHING if (step := recipe.step(kind)) is not None}
    tensors, problems = [], []
    for tensor in spec.tensors():
        found = {
            kind: (recipe.step(kind), rule) for kind, m in matchers.items() if (rule := m.match(tensor)) is not None
        }
        codec = found["quantize"][1].codec if "quantize" in found else _unmatched(tensor, checkpoint, own, containers)
        planned = in_pieces(planned_tensor(spec, tensor, codec, Rules(**found), containers), own, containers)
        if "prune" in found and "factorize" in found:
            problems.append(f"{tensor.role}: prune and factorize both name it; factors have a mask already")
        problems += tensor_problems(planned, containers)
        tensors.append(planned)
    unused = [str(rule) for kind, m in matchers.items() for rule in m.unused() if rule in recipe.step(kind).rules]
    return tensors, unused, problems


def _structural_savings(recipe: Recipe, spec: ModelSpec, checkpoint: Checkpoint, own: str) -> tuple[Saving, ...]:
    """What the steps save that leave a model of another shape, in the codecs of the recipe."""
    steps: dict[str, Any] = dict.fromkeys(STRUCTURAL)
    chain = [("", spec)]
    for kind, options in cuts(recipe, spec).items():
        if options is not None:
            steps[kind] = options
            found = candidates(spec, *steps.values())
            chain.append((kind, reduced(spec, likeliest(spec, found, steps["prune_structured"]))))

    def size(container: Container, model: ModelSpec) -> int:
        return sum(container.tensor_bytes(t, own) for t in _plan_tensors(recipe, model, checkpoint, own)[0])

    return structural(chain, recipe.containers, size) if len(chain) > 1 else ()


def _bytes(planned: PlannedTensor, recipe: Recipe, own: str) -> int:
    """Bytes of one tensor in the first container that stores codes, with everything needed to read it back; as our own
    would store it where the recipe only writes decoded values."""
    container = next((c for c in recipe.containers if not c.dense), packed_layout())
    return container.tensor_bytes(planned, own)


def _warnings(
    recipe: Recipe, spec: ModelSpec, original: ModelSpec, tensors: Sequence[PlannedTensor], own: str
) -> list[str]:
    """What users should know before they start."""
    warnings = [line for container in recipe.containers for line in container.caveats(spec)]
    structured = recipe.step("prune_structured")
    if structured is not None and structured.ratio is not None and (why := _heads_stay(recipe, spec)):
        warnings.append(f"{why}: heads stay, channels alone make up the {structured.ratio:.0%} of prune_structured")
    if original.tied and not spec.tied:
        warnings.append("rotate unties the head from the embeddings: both are stored")
    if any(codec_info(t.codec).kind != "float" for t in tensors):
        warnings += [
            f"{container.name} is dense: decoded weights are rounded to the checkpoint's own type ({own})"
            for container in recipe.containers
            if container.dense
        ]
    for wanted, count in Counter((t.wanted, t.codec) for t in tensors if t.wanted).items():
        warnings.append(
            f"{count} tensors have rows that do not divide into {wanted[0]} blocks and fall back to {wanted[1]}"
        )
    return warnings


def _unmatched(tensor: TensorSpec, checkpoint: Checkpoint, own: str, containers: Sequence[Container]) -> str:
    """No rule: the checkpoint's own float type, float32 for what engines want in float32."""
    entry = checkpoint.entries.get(tensor.name)
    codec = FLOAT_CODEC.get(entry.dtype, own) if entry else own
    precise = precise_float(containers) if tensor.role in FLOAT_ROLES else None
    return precise or codec
