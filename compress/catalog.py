"""What a recipe can be made of: solvers, transforms, codecs and containers, with bits per weight. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.codecs.names import FIXED_NAMES, UNIFORM_NAMES, codec_info, registered, stored_bytes
from compress.containers import CONTAINERS
from compress.recipe.schema import Factorize, Prune
from compress.recipe.schemes import SCHEMES
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS, RecoverOptions
from compress.structured.options import DropLayersOptions, PruneExpertsOptions, PruneStructuredOptions
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
    }
