"""Recipe + model -> Plan: what happens to every tensor, proved legal, with sizes and memory. No weights, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__, plugins
from compress.models.companions import companion_bytes
from compress.models.identity import Identity
from compress.models.spec import ModelSpec
from compress.plan import resources as footprint
from compress.plan.causes import Exchange
from compress.plan.outline import Outline
from compress.plan.reference import Reference
from compress.plan.savings import STRUCTURAL, Saving
from compress.plan.tensor import PlannedTensor, codes_container, factored, packed_bytes, pruned
from compress.recipe.schema import Recipe
from compress.solvers.options import RecoverOptions
from compress.structured.shapes import Reduction
from compress.transforms.options import RotateOptions, TransformOptions
from compress.weights import Pattern

if TYPE_CHECKING:
    from compress.containers import Container


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, before it does anything.

    `outline` is of the model that is compressed: the original, or what rotations and steps that change its shape make of it.
    """

    recipe: Recipe
    original: ModelSpec
    outline: Outline
    source: Path
    identity: Identity
    warnings: tuple[str, ...]
    source_bytes: int
    """Of the original's weight files."""
    own_codec: str = "bf16"
    """The checkpoint's own float type."""
    stamp: tuple[tuple[str, int, int], ...] = ()
    """Name, size and modification time of the weight files, so that a changed checkpoint does not resume."""
    doubts: tuple[str, ...] = ()
    """What speaks against the original: the warnings that a strict run stops at."""
    exchanges: tuple[Exchange, ...] = ()
    """Roles with tensors that are stored in another codec than the recipe's."""
    savings: tuple[Saving, ...] = ()
    """What steps that make the model smaller save, in every container."""
    shapes: tuple[Reduction, ...] = ()
    """Where steps change the model's shape: those that a survey may choose, all of about the same size."""
    repeats: Recipe | None = None
    """Where it is carried out once more: the recipe as the files of the first time know it."""
    base: Reference | None = None
    """What scores compare with, where that is not the model itself."""
    place: Path = Path()
    """Where the weights are read: `source`, or the GGUF file whose metadata `source` was written from."""
    chosen: tuple[str, ...] = ()
    """The warnings that say what was chosen where the recipe says nothing: it now does, and another plan of it would not
    know."""

    @property
    def told(self) -> Recipe:
        """The recipe as files that ship know it: the model by its name, no path of this machine."""
        return self.repeats or self.recipe.told(self.identity.version)

    def saying(self, chosen: tuple[str, ...]) -> Plan:
        """The same with more lines that say what was chosen."""
        return replace(self, chosen=(*self.chosen, *chosen), warnings=(*self.warnings, *chosen))

    @property
    def spec(self) -> ModelSpec:
        """The model that is compressed."""
        return self.outline.spec

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every tensor in execution order."""
        return self.outline.tensors

    @property
    def counted(self) -> tuple[tuple[PlannedTensor, int], ...]:
        """The tensors without those that others stand for, each with how many it stands for: see Outline."""
        return self.outline.counted

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
        return tuple(step.options for step in self.recipe.steps if isinstance(step.options, TransformOptions))

    @property
    def recover(self) -> RecoverOptions | None:
        """How floats are tuned once a block's codes are known."""
        return self.recipe.step("recover")

    @property
    def scheme(self) -> str | None:
        """The scheme, where it says all about which codec a tensor has."""
        quantize = self.recipe.step("quantize")
        shrunk = self.structural or self.recipe.step("prune") or self.recipe.step("factorize")
        return None if quantize is None or quantize.rules or quantize.ignore or shrunk else quantize.scheme

    @property
    def original_inputs(self) -> bool:
        """Whether solvers see the original's inputs, not those that the compressed layers before them give."""
        quantize = self.recipe.step("quantize")
        return quantize is not None and quantize.inputs == "original"

    @property
    def two_streams(self) -> bool:
        """Whether the original's activations are carried along beside the compressed model's."""
        drifts = any(t.asks.drift or t.asks.residual for t, _ in self.counted)
        return self.solves and not self.original_inputs and (drifts or self.recover is not None)

    @cached_property
    def by_name(self) -> Mapping[str, PlannedTensor]:
        return {t.name: t for t in self.tensors}

    @property
    def parameters(self) -> int:
        return self.spec.parameters

    @property
    def original_parameters(self) -> int:
        return self.original.parameters

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors in the first container that stores codes, which adds its header and tokenizer."""
        container = codes_container(self.recipe.containers)
        return sum(count * t.bytes for t, count in self.counted if container.has_place(t.spec))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for every weight of the original, in the weight files of the container that `bytes` counts."""
        return 8.0 * (self.bytes + self.beside_tensors) / self.weights_in(codes_container(self.recipe.containers))

    def weights_in(self, container: Container) -> int:
        """Weights of the original that a file stands for: all but those beside the decoder that it has no place for."""
        kept = {t.name for t in self.outline.beside if container.has_place(t.spec)}
        return self.original_parameters - sum(t.parameters for t in self.original.beside if t.name not in kept)

    @cached_property
    def beside_tensors(self) -> int:
        """About what those files hold beside their tensors: names, and what is copied of the tokenizer."""
        container = codes_container(self.recipe.containers)
        return container.beside_bytes(self.counted, self.source)

    @cached_property
    def original_bytes(self) -> int:
        """Of all files that are needed to run the original, the base of every share; of a GGUF file its own."""
        return self._itself.bytes

    @property
    def _itself(self) -> Reference:
        return Reference(self.identity.version, self.original, self.place, self.source, self.source_bytes, ())

    @property
    def compared(self) -> Reference:
        """What scores compare with."""
        return self.base or self._itself

    def settled(self, patterns: Mapping[str, Pattern], shares: Mapping[str, float]) -> Plan:
        """The plan once a survey has said, by tensor, which weights may stay and what share of its bytes factors take."""
        containers = self.recipe.containers

        def settle(planned: PlannedTensor) -> PlannedTensor:
            if planned.name in patterns:
                planned = pruned(planned, patterns[planned.name], containers)
            if planned.name in shares:
                planned = factored(planned, shares[planned.name])
            return replace(planned, bytes=packed_bytes(planned, containers, self.own_codec))

        return replace(self, outline=self.outline.changed(settle))

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

    @property
    def blocks(self) -> tuple[tuple[PlannedTensor, ...], ...]:
        return self.outline.blocks

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
        """Whether calibration text is read."""
        return self.solves or bool(set(self.open) - {"factors"})

    @property
    def reads_text(self) -> bool:
        """Whether anything calibrates or is scored."""
        return self.needs_calibration or self.recipe.score is not None

    @property
    def solves(self) -> bool:
        """Whether activations go through the blocks while they are compressed."""
        return any(t.method is not None and t.spec.input is not None for t, _ in self.counted)

    @property
    def activation_bytes(self) -> int:
        """One copy of the calibration activations, float32, on disk."""
        if not self.needs_calibration:
            return 0
        return self.recipe.calibration.samples * self.recipe.calibration.length * self.spec.hidden_size * 4

    @cached_property
    def artifact_bytes(self) -> Mapping[str, int]:
        """About all files that are needed to run each container: what a scorecard calls its bytes."""
        beside = companion_bytes(self.source)
        return {c.name: self.file_bytes[c.name] + (0 if c.suffix else beside) for c in self.recipe.containers}

    @cached_property
    def file_bytes(self) -> Mapping[str, int]:
        """About the weight files of each container: tensors, what names them, and what is copied of the tokenizer."""
        return {c.name: c.file_bytes(self.counted, self.own_codec, self.source) for c in self.recipe.containers}

    def artifact_name(self, container: Container, name: str | None = None) -> str:
        """Of an artifact's file or folder. name: the one that the recipe's export gives it."""
        mixture = f"{self.identity.name}-{self.scheme}" if self.scheme else None
        return container.file_name(self.recipe.name, name, mixture)

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
            "model": self.identity.version,
            "recipe": self.recipe.name,
            "digest": self.digest,
            "architecture": self.spec.model_type,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "source_bytes": self.source_bytes,
            "original_bytes": self.original_bytes,
            "artifact_bytes": dict(self.artifact_bytes),
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "containers": [e.container for e in self.recipe.export],
            "file_bytes": dict(self.file_bytes),
            "warnings": list(self.warnings),
            "fallbacks": [asdict(exchange) for exchange in self.exchanges],
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


def _works_on(step: str, planned: PlannedTensor) -> bool:
    """Whether a kind of step changes this tensor's values."""
    own = {"prune": planned.pattern, "factorize": planned.factors}
    return planned.method is not None and (step not in own or own[step] is not None)
