"""Token mixers that transformers' own modules compute: here only what they are made of. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress.models.layers.base import Sublayer


@dataclass(frozen=True)
class Hosted(Sublayer):
    """A sub-layer that is a table beside a module of transformers.

    config: config.json as JSON, from which the module is built; module: its class, dotted; prefix: of its tensors in the
    block; rotary: the class that gives it positions, "" for none; masked: it wants to be told which tokens see which. `linears`
    names the inputs of its submodules.
    """

    config: str
    module: str
    prefix: str
    rotary: str = ""
    masked: bool = False
    half: ClassVar[str] = "attention"
    forward: ClassVar[str] = "hosted"

    @property
    def linears(self) -> Mapping[str, str]:
        """Submodule -> key of its input; one for every input."""
        raise NotImplementedError
