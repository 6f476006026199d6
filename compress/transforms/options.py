"""The options of every transform, without importing torch; the keys of a recipe's steps are validated with these classes."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Place = Literal["attention.in", "attention.out", "ffn.in", "ffn.act"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Places = Annotated[tuple[Place, ...], BeforeValidator(_tuple), Field(min_length=1)]


class TransformOptions(BaseModel):
    """Base of the scalings of a block; `fold` names the inputs whose channels are scaled."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    module: ClassVar[str] = ""
    name: str
    fold: Places = ("attention.in", "attention.out", "ffn.in", "ffn.act")

    @property
    def implementation(self) -> ModuleType:
        """The module with its `search`."""
        return import_module(self.module or f"compress.transforms.{self.name}")


class AwqOptions(TransformOptions):
    """Activation-aware scaling: channels with large activations get finer steps."""

    name: Literal["awq"] = "awq"
    grid: int = Field(20, ge=1, description="steps in which the exponent of the activations goes from 0 to 1")
    duo: bool = Field(True, description="divide by the weights' own magnitudes, too")


class SmoothOptions(TransformOptions):
    """SmoothQuant: move the activations' outliers into the weights, for 8-bit activations."""

    name: Literal["smooth"] = "smooth"
    fold: Places = ("attention.in", "ffn.in")
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the difficulty moves from activations to weights")


SCALINGS: dict[str, type[TransformOptions]] = {"awq": AwqOptions, "smooth": SmoothOptions}


def register(options: type[TransformOptions]) -> None:
    """Make a scaling from outside known by its name, which is then a kind of step: a subclass of TransformOptions whose
    `module` has a `search` like AWQ's. Raises ValueError when the name is taken."""
    name = options.model_fields["name"].default
    if SCALINGS.get(name, options) is not options:
        raise ValueError(f"there is a step called {name} already; give yours another name")
    SCALINGS[name] = options


class RotateOptions(BaseModel):
    """Rotations merged into the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kinds: Annotated[tuple[Literal["R1", "R2"], ...], BeforeValidator(_tuple), Field(min_length=1)] = ("R1", "R2")
    """R1 turns the residual stream, R2 the value heads."""
    seed: int = Field(0, ge=0, description="of the random signs")
