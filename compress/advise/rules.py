"""The rules of `compress advise`, and what was measured of the recipes they name: two YAML files, read strictly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.limits import YAML_BYTES
from compress.machine import Machine
from compress.models.spec import ModelSpec
from compress.reading import Yaml, read_text


@dataclass(frozen=True)
class Facts:
    """What conditions speak of: see rules.yaml."""

    gpu: bool
    mixture: bool
    tables: bool

    @classmethod
    def of(cls, spec: ModelSpec, machine: Machine, by: Rules) -> Facts:
        gpu = bool(machine.gpus)
        return cls(gpu, bool(spec.experts), gpu or bool(set(by.tables) & set(machine.cpu.features)))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class When(Section):
    """Facts that must hold; None: whatever they are."""

    gpu: bool | None = None
    mixture: bool | None = None
    tables: bool | None = None

    def holds(self, facts: Facts) -> bool:
        wanted = self.model_dump(exclude_none=True)
        return all(getattr(facts, name) is value for name, value in wanted.items())


class Use(Section):
    """What a model is for: the context that wants, why, and what to say of calibration."""

    context: int = Field(ge=256)
    why: str
    calibrate: str | None = None


class Propose(Section):
    """How many proposals there are at most, and what share of the bytes of the one before the next one takes at most."""

    most: int = Field(ge=1)
    step: float = Field(gt=0, lt=1)


class Candidate(Section):
    """A bundled recipe or a scheme, when it may be proposed, and why."""

    recipe: str
    when: When = When()
    why: str


class Rules(Section):
    """rules.yaml. tables: features of processors that are quick at look-ups; candidates: best expected quality first."""

    uses: dict[str, Use]
    propose: Propose
    tables: Annotated[tuple[str, ...], BeforeValidator(_tuple)]
    candidates: Annotated[tuple[Candidate, ...], BeforeValidator(_tuple), Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> Rules:
        names = [candidate.recipe for candidate in self.candidates]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is a candidate twice")
        return self


@dataclass(frozen=True)
class Expected:
    """A measured mean KL divergence from the original, nats a token, with its 95% interval; of: the model it was measured on,
    in words; parameters: of that; text: what was read."""

    kl: float
    low: float
    high: float
    of: str
    parameters: int
    text: str


class Measurements(Section):
    """What was measured of recipes in one go. table: the mark of its table in docs/benchmarks.md; kl: recipe -> mean KL
    divergence and the ends of its interval."""

    of: str
    parameters: int
    text: str
    table: str
    kl: dict[str, Annotated[tuple[float, float, float], BeforeValidator(_tuple)]]


class Quality(Section):
    """quality.yaml."""

    measured: Annotated[tuple[Measurements, ...], BeforeValidator(_tuple)]

    def expected(self, recipe: str) -> Expected | None:
        """What is known of a recipe: from the largest model that it was measured on."""
        found = [one for one in self.measured if recipe in one.kl]
        best = max(found, key=lambda one: one.parameters, default=None)
        return None if best is None else Expected(*best.kl[recipe], best.of, best.parameters, best.text)


@cache
def rules() -> Rules:
    """The rules that ship."""
    return Rules.model_validate(_read("rules.yaml"))


@cache
def quality() -> Quality:
    """The measurements that ship, copied from docs/benchmarks.md."""
    return Quality.model_validate(_read("quality.yaml"))


def _read(name: str) -> Any:
    return Yaml(read_text(Path(__file__).parent / name, YAML_BYTES)).data
