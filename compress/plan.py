"""Recipe + model -> Plan: what happens to every tensor, proved legal, with sizes and memory. No weights, no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from compress import __version__, plugins
from compress.checkpoint import Checkpoint
from compress.codecs.names import codec_info, ggml_fallback, stored_bytes
from compress.errors import OutputError, PlanError, UnsupportedModel
from compress.legal import (
    FLOAT_CODEC,
    checkpoint_problems,
    container_problems,
    step_problems,
    tensor_problems,
    text_problems,
)
from compress.models.base import ModelSpec, TensorSpec, load_spec
from compress.recipe import Quantize, Recipe
from compress.solvers.options import RecoverOptions, RtnOptions, SolverOptions
from compress.targets import Rule
from compress.transforms.options import RotateOptions, TransformOptions

# What the process takes beside the model: interpreter, torch, tokenizer, allocator and the solvers' scratch on two cores;
# measured by benchmarks/memory_by_depth.py with torch 2.13 on Linux.
RUNTIME_BYTES = 850 * 2**20
MOMENTS_BYTES = 2 * 2**30  # statistics held at once; experts beyond it take another pass over the calibration text
BATCH_TOKENS = 4096  # tokens that go through a block at once
CODES_FROM_BITS = 6.0  # tensors with as many bits a weight round so finely that recovery tunes them as float
LOGIT_VALUES = 1 << 24  # logits that end-to-end recovery computes at once
LOGITS_BYTES = 6 * 4 * LOGIT_VALUES  # of both models, their logarithms and gradients


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor and what becomes of it. `solver` is None where values are stored as they are."""

    spec: TensorSpec
    codec: str
    solver: SolverOptions | None
    bytes: int
    wanted: str | None = None
    """The codec the recipe asked for, when rows do not divide into its blocks."""
    incoherence: bool = False
    """Whether the codes are those of the weight between two randomised Hadamard transforms."""
    activations: str | None = None
    """How an engine rounds the inputs of this linear ("int8": each token by its largest value)."""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, before it does anything.

    `spec` is the model that is compressed: the original, or what a rotation makes of it.
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
        drifts = any(getattr(t.solver, "drift", 0.0) or getattr(t.solver, "residual", 0.0) for t in self.tensors)
        return self.needs_calibration and (drifts or self.recover is not None)

    @cached_property
    def by_name(self) -> Mapping[str, PlannedTensor]:
        return {t.name: t for t in self.tensors}

    @property
    def parameters(self) -> int:
        return sum(t.spec.parameters for t in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the first container that stores codes, which adds its header and tokenizer."""
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / self.parameters

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
        return self._blocks[layer]

    @cached_property
    def _blocks(self) -> tuple[tuple[PlannedTensor, ...], ...]:
        blocks: list[list[PlannedTensor]] = [[] for _ in range(self.spec.layers)]
        for tensor in self.tensors:
            if tensor.spec.layer is not None:
                blocks[tensor.spec.layer].append(tensor)
        return tuple(tuple(b) for b in blocks)

    @property
    def needs_calibration(self) -> bool:
        return any(t.solver is not None and t.spec.input is not None for t in self.tensors)

    @property
    def activation_bytes(self) -> int:
        """One copy of the calibration activations, float32, on disk."""
        if not self.needs_calibration:
            return 0
        return self.recipe.calibration.samples * self.recipe.calibration.length * self.spec.hidden_size * 4

    @property
    def disk_bytes(self) -> int:
        """Work folder (packed blocks; activations of both models at three places; what recovery keeps) and one copy of
        every artifact."""
        work = sum(t.spec.parameters if codec_info(t.codec).kind == "uniform" else t.bytes for t in self.tensors)
        out = sum(2 * self.parameters if e.container == "safetensors" else self.bytes for e in self.recipe.export)
        return work + out + 6 * self.activation_bytes + self._recovery_disk_bytes

    @property
    def _recovery_disk_bytes(self) -> int:
        """Sensitivities and the passes that measure them; for end-to-end recovery every block's codes apart from their
        scales, parameters with Adam's moments, tensors that will replace others, and a batch at every block's input."""
        recover, spec, text = self.recover, self.spec, self.recipe.calibration
        if recover is None or not self.needs_calibration:
            return 0
        token = 4 * spec.hidden_size
        survey = min(recover.survey, text.samples) * text.length * token
        survey = (spec.layers + 2) * survey + spec.layers * spec.hidden_size * token if recover.loss != "mse" else 0
        if not recover.end_to_end:
            return survey
        blocks = [t for block in self._blocks for t in block]
        outcomes = sum(_outcome_bytes(t) for t in blocks)
        state = sum(16 * _tuned_parameters(t, recover.tune) for t in blocks)
        batch = (spec.layers + 1) * max(BATCH_TOKENS, text.length) * token
        return survey + outcomes + state + sum(t.bytes for t in blocks) + batch + 2 * self.activation_bytes

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Runtime + the largest block in float32, original and decoded + the grams of its hungriest stage + a batch
        of activations + the embedding or head. Recovery: the block's codes, a copy for autograd, codes times scales,
        dense weights and their gradients, parameters and what Adam keeps; end to end also both heads. Independent of
        the number of blocks."""
        spec = self.spec
        blocks = [sum(t.spec.parameters for t in block) * 4 for block in self._blocks]
        grams = 0
        for block in self._blocks:
            stages: dict[bool, dict[str, int]] = {True: {}, False: {}}
            for t in block:
                if t.solver is not None and t.spec.input is not None:
                    stages[t.spec.input.endswith("act")][t.spec.input] = moments_bytes(spec, t)
            for sizes in stages.values():
                grams = max(grams, min(sum(sizes.values()), max(MOMENTS_BYTES, *sizes.values(), 0)))
        widest = max(
            (t.spec.parameters for t in self.tensors if len(t.spec.shape) == 2 and t.spec.layer is not None), default=0
        )
        solve = widest * 4 * 12
        batch = BATCH_TOKENS * 4 * (6 * spec.hidden_size + 4 * max(spec.intermediate_size, spec.moe_intermediate_size))
        head = spec.vocab_size * spec.hidden_size * 4 * 3
        largest, recovery = max(blocks, default=0), 0
        if self.recover is not None and self.needs_calibration:
            tune = self.recover.tune
            tuned = max((sum(16 * _tuned_parameters(t, tune) for t in block) for block in self._blocks), default=0)
            heads = 2 * spec.vocab_size * spec.hidden_size * 4 + LOGITS_BYTES if self.recover.end_to_end else 0
            recovery = 5 * largest + tuned + 3 * batch + heads  # autograd keeps what a block computes on the way
        return RUNTIME_BYTES + max(2 * largest + grams + solve + batch, head + batch, recovery)

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
            "warnings": list(self.warnings),
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.spec.shape),
                    "role": t.spec.role,
                    "layer": t.spec.layer,
                    "steps": [step.kind for step in self.recipe.steps] if t.solver else [],
                    "solver": t.solver.name if t.solver else None,
                    "codec": t.codec,
                    "wanted": t.wanted,
                    "incoherence": t.incoherence,
                    "activations": t.activations,
                    "bytes": t.bytes,
                }
                for t in self.tensors
            ],
        }


def _tuned_parameters(planned: PlannedTensor, tune: Sequence[str]) -> int:
    """About how many parameters recovery gives a tensor of a block: all of what is stored as float or rounded finely
    enough to be rounded again, else one for every stored scale, of which formats have one for 32 weights or fewer."""
    size = planned.spec.parameters
    if planned.solver is None:
        return size if planned.spec.role in tune else 0
    if "codes" in tune and 8 * planned.bytes >= CODES_FROM_BITS * size:
        return size
    return size // 32 if "scales" in tune else 0


def _outcome_bytes(planned: PlannedTensor) -> int:
    """About what the solved tensor takes with codes and scales apart: small integers a byte, other levels more."""
    if planned.solver is None:
        return 0
    return planned.spec.parameters * (2 if codec_info(planned.codec).kind in ("ggml", "uniform") else 5)


def repairs_residual(spec: ModelSpec, planned: PlannedTensor) -> bool:
    """Whether this linear's target also makes up for the lag of the residual stream it is added to.

    Only where it alone stands for all that is added: o_proj, a dense down_proj, or a routed expert whose routing weights
    sum to one. Others would repair the same lag several times over.
    """
    if not getattr(planned.solver, "residual", 0.0):
        return False
    if planned.spec.role == "routed_experts.down":
        assert spec.family.moe is not None
        return spec.norm_topk and not spec.family.moe.shared
    return planned.spec.role in ("attention.o", "mlp.down")


def surveys_head(spec: ModelSpec, tensor: TensorSpec, codec: str) -> bool:
    """Whether a tied embedding is solved as the head it also is, which takes a survey pass over the original.

    Not worth the pass from 8 bits up.
    """
    return spec.tied and tensor.role == "embeddings" and 8 * stored_bytes(codec, tensor.shape) < 8 * tensor.parameters


def moments_bytes(spec: ModelSpec, planned: PlannedTensor) -> int:
    """Memory of the statistics behind one solved tensor, float32."""
    n = planned.spec.shape[-1]
    squares = 1 + bool(getattr(planned.solver, "drift", 0.0))
    return 4 * n * (squares * n + (spec.hidden_size if repairs_residual(spec, planned) else 0))


def make_plan(recipe: Recipe, *, weights: bool = False) -> Plan:
    """Prove a recipe legal for its model.

    weights=True also demands that every tensor is in the checkpoint with the shape the config implies.
    Raises PlanError with all problems, UnsupportedModel, CheckpointError or CalibrationError.
    """
    checkpoint = Checkpoint.open(model_location(recipe.model), weights=weights)
    original = load_spec(checkpoint.config)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UnsupportedModel(f"{recipe.model} is already quantized ({method}); give the original float checkpoint")
    spec = original.untied() if recipe.step("rotate") else original
    problems = container_problems(recipe, spec) + text_problems(recipe, spec) + step_problems(recipe)
    if problems:
        raise PlanError(problems)

    quantize = recipe.step("quantize")
    matcher = quantize.matcher(spec) if quantize else None
    kinds = {e.container for e in recipe.export}
    own = FLOAT_CODEC.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), "f16")
    tensors: list[PlannedTensor] = []
    for tensor in spec.tensors():
        rule = matcher.match(tensor) if matcher else None
        codec = rule.codec if rule else _unmatched(tensor, checkpoint, own, kinds)
        planned = _planned(spec, tensor, codec, rule, quantize, kinds)
        problems += tensor_problems(planned, kinds)
        tensors.append(planned)
    if weights:
        problems += checkpoint_problems(original, checkpoint)
    if problems:
        raise PlanError(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
    for kind in sorted(kinds - {"safetensors"}):
        try:
            container_module(kind).check_plan(spec, tensors)
        except OutputError as error:
            problems.append(f"{kind}: {error}")
    if problems:
        raise PlanError(problems)
    counted = next((e.container for e in recipe.export if e.container != "safetensors"), None)
    tensors = [replace(t, bytes=_bytes(t, counted)) for t in tensors]
    unused = [rule for rule in matcher.unused() if rule in quantize.rules] if matcher else []
    warnings = [f"rule matches no tensor of this model: {rule}" for rule in unused]
    warnings += _warnings(spec, original, tensors, kinds, own)
    source = sum(2 * t.parameters for t in original.tensors())
    if checkpoint.entries:
        source = sum(file.stat().st_size for file in {e.file for e in checkpoint.entries.values()})
    stamp = tuple(
        sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in {t.file for t in checkpoint.entries.values()})
    )
    return Plan(recipe, original, spec, checkpoint.folder, tuple(tensors), tuple(warnings), source, own, stamp)


def _planned(
    spec: ModelSpec, tensor: TensorSpec, codec: str, rule: Rule | None, quantize: Quantize | None, kinds: set[str]
) -> PlannedTensor:
    """What becomes of one tensor, its bytes still to be counted."""
    if len(tensor.shape) == 1 and "gguf" in kinds:
        codec = "f32"  # llama.cpp's norms and biases are float32
    wanted = None
    if codec_info(codec).kind == "ggml" and (replacement := ggml_fallback(codec, tensor.shape[-1])):
        wanted, codec = codec, replacement
    info = codec_info(codec)
    if rule is None or quantize is None or info.kind == "float":
        return PlannedTensor(tensor, codec, None, 0, wanted)
    solver = quantize.solver_of(rule)
    if tensor.input is None and not surveys_head(spec, tensor, codec):
        solver = RtnOptions()  # rows that are looked up have no input statistics to solve against
    incoherence = info.kind == "vector" if rule.incoherence is None else rule.incoherence
    return PlannedTensor(tensor, codec, solver, 0, wanted, incoherence, rule.activations)


def _bytes(planned: PlannedTensor, container: str | None) -> int:
    """Bytes of one tensor in a container with everything needed to read it back; as `compress` would store it where
    the recipe only writes decoded values."""
    return container_module(container or "compress").tensor_bytes(planned)


def _warnings(
    spec: ModelSpec, original: ModelSpec, tensors: Sequence[PlannedTensor], kinds: set[str], own: str
) -> list[str]:
    """What users should know before they start."""
    warnings = []
    if "gguf" in kinds:
        from compress.containers.gguf import caveats

        warnings += caveats(spec)
    if original.tied and not spec.tied:
        warnings.append("rotate unties the head from the embeddings: both are stored")
    if "safetensors" in kinds and any(codec_info(t.codec).kind != "float" for t in tensors):
        warnings.append(f"safetensors is dense: decoded weights are rounded to the checkpoint's own type ({own})")
    for wanted, count in Counter((t.wanted, t.codec) for t in tensors if t.wanted).items():
        warnings.append(
            f"{count} tensors have rows that do not divide into {wanted[0]} blocks and fall back to {wanted[1]}"
        )
    return warnings


def container_module(container: str) -> ModuleType:
    """The module that writes and reads a container; YAML names may have dashes."""
    return import_module(f"compress.containers.{container.replace('-', '_')}")


def model_location(model: str) -> str:
    """A folder as given, a bundled demo model by name or `models/name`, or a hub id."""
    from compress.text import data_root

    if not Path(model).is_dir():
        bundled = data_root("models") / Path(model).name
        if model in (bundled.name, f"models/{bundled.name}") and bundled.is_dir():
            return str(bundled)
    return model


def _unmatched(tensor: TensorSpec, checkpoint: Checkpoint, own: str, kinds: set[str]) -> str:
    """No rule: the checkpoint's own float type, float32 for what engines want in float32."""
    entry = checkpoint.entries.get(tensor.name)
    codec = FLOAT_CODEC.get(entry.dtype, own) if entry else own
    return "f32" if "gguf" in kinds and tensor.role in ("router", "norms", "biases") else codec
