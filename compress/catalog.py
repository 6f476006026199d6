"""What a recipe can be made of: solvers, transforms, codecs and containers, with bits per weight; which models it can be carried out
on. No torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.codecs.names import FIXED_NAMES, UNIFORM_NAMES, codec_info, registered, stored_bytes
from compress.containers import CONTAINERS
from compress.models.example import example_of
from compress.models.spec import Family, ModelSpec, known_families
from compress.models.wrappers import WRAPPERS
from compress.recipe.schema import Factorize, Prune
from compress.recipe.schemes import SCHEMES
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS, RecoverOptions
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
from compress.structured.shapes import reduction_problems
from compress.transforms.options import SCALINGS, AwqOptions, RotateOptions, SmoothOptions

REFERENCE = (4096, 4096)  # the matrix whose bits per weight are listed; scales of rows weigh more in smaller ones
STEPS: Mapping[str, type] = {
    "rotate": RotateOptions,
    "drop_layers": DropLayersOptions,
    "prune_experts": PruneExpertsOptions,
    "prune_structured": PruneStructuredOptions,
    "awq": AwqOptions,
    "smooth": SmoothOptions,
    "prune": Prune,
    "factorize": Factorize,
    "recover": RecoverOptions,
}


@dataclass(frozen=True)
class Method:
    """One name a recipe may use and what it does."""

    name: str
    about: str


@dataclass(frozen=True)
class CodecLine:
    """One codec: kind, bits per weight of a 4096 x 4096 matrix with everything stored, and who takes it."""

    name: str
    kind: str
    bits_per_weight: float
    containers: tuple[str, ...]


@dataclass(frozen=True)
class FamilyLine:
    """One family of models and what works on it, as its declarations say; reasons are those that a plan gives.

    name: what people call it; about: what it is made of; model_types: of config.json, those of multimodal models around it
    among them; archs: llama.cpp's; steps: the steps that change the model, each with why it cannot be taken, "" where it can;
    containers: each with what it cannot hold, "" where it holds all.
    """

    name: str
    about: str
    model_types: tuple[str, ...]
    archs: tuple[str, ...]
    steps: Mapping[str, str]
    containers: Mapping[str, str]


def _about(options: type) -> str:
    return (options.__doc__ or "").strip().splitlines()[0]


def solvers() -> tuple[Method, ...]:
    """The solvers, simplest first."""
    return tuple(Method(name, _about(options)) for name, options in SOLVERS.items())


def pruners() -> tuple[Method, ...]:
    """What chooses the weights that stay."""
    return tuple(Method(name, _about(options)) for name, options in PRUNERS.items())


def factorizers() -> tuple[Method, ...]:
    """What writes a matrix as a product of two."""
    return tuple(Method(name, _about(options)) for name, options in FACTORIZERS.items())


def steps() -> tuple[Method, ...]:
    """The other kinds of step, in the order a recipe has them."""
    return tuple(Method(name, _about(options)) for name, options in {**STEPS, **SCALINGS}.items())


def codecs() -> tuple[CodecLine, ...]:
    """Every codec a recipe may name, smallest first."""
    lines = []
    for name in (*FIXED_NAMES, *UNIFORM_NAMES, *registered()):
        bits = 8 * stored_bytes(name, REFERENCE) / (REFERENCE[0] * REFERENCE[1])
        takers = tuple(container.name for container in CONTAINERS.values() if container.takes(name))
        lines.append(CodecLine(name, codec_info(name).kind, bits, takers))
    return tuple(sorted(lines, key=lambda line: (line.bits_per_weight, line.name)))


def families() -> tuple[FamilyLine, ...]:
    """The families of models, by name."""
    found = {id(family): family for family in known_families().values()}.values()
    return tuple(sorted(map(_family_line, found), key=lambda line: line.name.lower()))


def _family_line(family: Family) -> FamilyLine:
    spec = example_of(family)
    said = (sys.modules[family.block.__module__].__doc__ or family.model_types[0]).strip().splitlines()[0].rstrip(".")
    name, _, about = said.partition(": ")
    types = (*family.model_types, *family.also)
    around = tuple(kind for kind, wrapper in WRAPPERS.items() if set(wrapper.families) & set(types))
    return FamilyLine(name, about, (*types, *around), family.gguf.archs, _steps_of(spec), _containers_of(spec))


def _steps_of(spec: ModelSpec) -> dict[str, str]:
    """Steps that change a model, and why each cannot be taken."""
    least = DropLayersOptions(count=1)
    told = {
        "rotate": [f"{spec.fixed_stream}: kinds: [R2] alone"] if spec.fixed_stream else [],
        "drop_layers": reduction_problems(spec, drop=least),
        "prune_experts": reduction_problems(spec, experts=PruneExpertsOptions(ratio=0.25)),
        "prune heads": [spec.family.fixed_heads or spec.family.fixed_channels],
        "prune channels": [spec.family.fixed_channels],
    }
    return {step: (problems or [""])[0].removeprefix(f"{step}: ") for step, problems in told.items()}


def _containers_of(spec: ModelSpec) -> dict[str, str]:
    """Containers, and what each cannot hold of a model."""
    stacked = any(weight.stacked for block in spec.blocks for s in block for weight in s.weights)
    told = {}
    for name, container in CONTAINERS.items():
        reasons = container.unrepresentable(spec)
        if stacked and not (container.suffix or container.dense):
            reasons = [*reasons, "routed experts as floats alone: its engines read them stacked"]
        told[name] = "; ".join(reasons)
    return told


def as_dict() -> Mapping[str, Any]:
    """Everything, for --json."""
    return {
        "steps": [asdict(m) for m in steps()],
        "solvers": [asdict(m) for m in solvers()],
        "pruners": [asdict(m) for m in pruners()],
        "factorizers": [asdict(m) for m in factorizers()],
        "codecs": [asdict(c) for c in codecs()],
        "containers": {name: container.engines for name, container in CONTAINERS.items()},
        "schemes": list(SCHEMES),
        "families": [asdict(f) for f in families()],
    }
