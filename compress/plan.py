"""Recipe + model -> Plan: what happens to every tensor, proved legal, with sizes and memory. No weights, no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint import Checkpoint
from compress.codecs.names import CONTAINERS, codec_info, ggml_fallback, stored_bytes
from compress.errors import CheckpointError, OutputError, PlanError, UnsupportedModel
from compress.models.base import ModelSpec, TensorSpec, load_spec
from compress.recipe import Recipe
from compress.solvers.options import RtnOptions, SolverOptions
from compress.text import find_data, load_suite

_FLOAT_CODEC = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "F32": "f32", "F16": "f16", "BF16": "bf16"}
# What the process takes beside the model: interpreter, torch, tokenizer, allocator and the solvers' scratch on two cores;
# measured by benchmarks/memory_by_depth.py with torch 2.13 on Linux.
RUNTIME_BYTES = 850 * 2**20
MOMENTS_BYTES = 2 * 2**30  # statistics held at once; experts beyond it take another pass over the calibration text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
BATCH_TOKENS = 4096  # tokens that go through a block at once


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor and what becomes of it. `solver` is None where values are stored as they are."""

    spec: TensorSpec
    codec: str
    solver: SolverOptions | None
    bytes: int
    wanted: str | None = None
    """The codec the recipe asked for, when rows do not divide into its blocks."""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, before it does anything."""

    recipe: Recipe
    spec: ModelSpec
    source: Path
    tensors: tuple[PlannedTensor, ...]
    warnings: tuple[str, ...]
    source_bytes: int
    own_codec: str = "bf16"
    """The checkpoint's own float type."""
    stamp: tuple[tuple[str, int, int], ...] = ()
    """Name, size and modification time of the weight files, so that a changed checkpoint does not resume."""

    @cached_property
    def by_name(self) -> Mapping[str, PlannedTensor]:
        return {t.name: t for t in self.tensors}

    @property
    def parameters(self) -> int:
        return sum(t.spec.parameters for t in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors; containers add their header and tokenizer."""
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
        """Work folder (packed blocks; activations of both models at three places) and one copy of every artifact."""
        work = sum(t.spec.parameters if codec_info(t.codec).kind == "uniform" else t.bytes for t in self.tensors)
        out = sum(2 * self.parameters if e.container == "safetensors" else self.bytes for e in self.recipe.export)
        return work + out + 6 * self.activation_bytes

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Runtime + the largest block in float32, original and decoded + the grams of its hungriest stage + a batch
        of activations + the embedding or head. Independent of the number of blocks."""
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
        return RUNTIME_BYTES + max(2 * max(blocks, default=0) + grams + solve + batch, head + batch)

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
                    "steps": ["quantize"] if t.solver else [],
                    "solver": t.solver.name if t.solver else None,
                    "codec": t.codec,
                    "wanted": t.wanted,
                    "bytes": t.bytes,
                }
                for t in self.tensors
            ],
        }

    def by_role(self) -> list[tuple[str, str, int, int, int]]:
        """(role, codec, tensors, parameters, bytes), in model order, for tables."""
        rows: dict[tuple[str, str], list[int]] = {}
        for t in self.tensors:
            row = rows.setdefault((t.spec.role, t.codec), [0, 0, 0])
            row[0] += 1
            row[1] += t.spec.parameters
            row[2] += t.bytes
        return [(role, codec, *row) for (role, codec), row in rows.items()]


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
    spec = load_spec(checkpoint.config)
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UnsupportedModel(f"{recipe.model} is already quantized ({method}); give the original float checkpoint")
    problems = _container_problems(recipe, spec)
    warnings: list[str] = []
    rope = (spec.rope_scaling or {}).get("rope_type", (spec.rope_scaling or {}).get("type", "default"))
    if rope not in ROPE_TYPES:
        problems.append(f"rope scaling {rope!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    calibration = recipe.calibration
    find_data("calibration", calibration.dataset)
    if calibration.length > spec.max_positions:
        problems.append(
            f"calibration.length {calibration.length} is longer than the model's limit of "
            f"{spec.max_positions} positions; lower calibration.length"
        )
    if recipe.score is not None:
        suite = load_suite(recipe.score.suite)
        if suite.length > spec.max_positions:
            problems.append(
                f"suite {suite.name} scores windows of {suite.length} tokens, the model allows "
                f"{spec.max_positions}; choose another suite or score: false"
            )
    elif recipe.gate.max_kld is not None or recipe.gate.max_perplexity_ratio is not None:
        problems.append("gate: its limits need scores, and score is false; set a suite or drop the limits")
    if len(recipe.steps) > 1:
        problems.append("more than one quantize step: a tensor can be quantized once; put all rules in one step")
    if problems:
        raise PlanError(problems)

    quantize = recipe.steps[0].quantize if recipe.steps else None
    matcher = quantize.matcher(spec) if quantize else None
    kinds = {e.container for e in recipe.export}
    own = _FLOAT_CODEC.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), "f16")
    tensors = []
    for tensor in spec.tensors():
        rule = matcher.match(tensor) if matcher else None
        codec = rule.codec if rule else _unmatched(tensor, checkpoint, own, kinds)
        if len(tensor.shape) == 1 and "gguf" in kinds:
            codec = "f32"  # llama.cpp's norms and biases are float32
        wanted = None
        info = codec_info(codec)
        if info.kind == "ggml" and (replacement := ggml_fallback(codec, tensor.shape[-1])):
            wanted, codec = codec, replacement
        elif info.kind == "uniform" and info.block and tensor.shape[-1] % info.block:
            problems.append(
                f"{tensor.name}: rows of {tensor.shape[-1]} do not divide into groups of {info.block}; "
                f"use a smaller group or int{info.bits}-row"
            )
        elif info.kind == "uniform" and "gptq" in kinds and (tensor.shape[-1] % 32 or tensor.shape[0] % 32):
            problems.append(
                f"{tensor.name}: GPTQ kernels need dimensions that divide by 32, this one is "
                f"{tensor.shape[0]} x {tensor.shape[1]}; add it to ignore"
            )
        solver = quantize.solver_of(rule) if rule and codec_info(codec).kind != "float" else None
        if solver is not None and tensor.input is None and not surveys_head(spec, tensor, codec):
            solver = RtnOptions()  # rows that are looked up have no input statistics to solve against
        tensors.append(
            PlannedTensor(tensor, codec, solver, 0 if problems else stored_bytes(codec, tensor.shape), wanted)
        )
    if matcher:
        warnings += [
            f"rule matches no tensor of this model: {rule}"
            for rule in matcher.unused()
            if quantize and rule in quantize.rules
        ]
    if weights:
        problems += checkpoint_problems(spec, checkpoint)
    for kind in sorted(kinds & {"gguf", "gptq"} if not problems else ()):
        module = import_module(f"compress.containers.{kind}")
        try:
            module.check_plan(spec, tensors)
        except OutputError as error:
            problems.append(f"{kind}: {error}")
    if "gguf" in kinds:
        from compress.containers.gguf import caveats

        warnings += caveats(spec)
    if "safetensors" in kinds and any(codec_info(t.codec).kind != "float" for t in tensors):
        warnings.append(f"safetensors is dense: decoded weights are rounded to the checkpoint's own type ({own})")
    if problems:
        raise PlanError(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
    for wanted, count in Counter((t.wanted, t.codec) for t in tensors if t.wanted).items():
        warnings.append(
            f"{count} tensors have rows that do not divide into {wanted[0]} blocks and fall back to {wanted[1]}"
        )
    source = sum(2 * t.spec.parameters for t in tensors)
    if checkpoint.entries:
        source = sum(file.stat().st_size for file in {e.file for e in checkpoint.entries.values()})
    stamp = tuple(
        sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in {t.file for t in checkpoint.entries.values()})
    )
    return Plan(recipe, spec, checkpoint.folder, tuple(tensors), tuple(warnings), source, own, stamp)


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
    codec = _FLOAT_CODEC.get(entry.dtype, own) if entry else own
    return "f32" if "gguf" in kinds and tensor.role in ("router", "norms", "biases") else codec


def _container_problems(recipe: Recipe, spec: ModelSpec) -> list[str]:
    problems = []
    for export in recipe.export:
        assert export.container in CONTAINERS
        if export.container == "gguf":
            from compress.containers.gguf import check_representable

            problems += [f"gguf: {reason}" for reason in check_representable(spec)]
    return problems


def checkpoint_problems(spec: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    """Tensors of another shape than config.json implies; CheckpointError for the first that is not there."""
    problems = []
    for tensor in spec.tensors():
        entry = checkpoint.entries.get(tensor.name)
        if entry is None:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor {tensor.name}; the checkpoint does not fit its config.json"
            )
        if entry.dtype not in _FLOAT_CODEC:
            problems.append(
                f"{tensor.name} is stored as {entry.dtype}; give the original checkpoint in F32, F16 or BF16"
            )
        if entry.shape != tensor.shape:
            problems.append(
                f"{tensor.name} is {list(entry.shape)} in the checkpoint, config.json implies {list(tensor.shape)}"
            )
    return problems
