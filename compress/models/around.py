"""What a family says of its model beside the blocks: the names around them, what is computed there, what llama.cpp makes of it.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.models.layers.base import Sublayer, Weight


@dataclass(frozen=True)
class Gguf:
    """llama.cpp's architecture of a family, and what it computes whatever the config says.

    variants: architectures that llama.cpp has for some configs of the family alone, each with the test for them. normalises:
    whether chosen experts' weights are divided by their sum: True, False, or None where the metadata says; dense_layers: layers
    without experts may stand beside those with; heads_fill_width: heads x head_dim must be the hidden size; tied: the head may
    be the embeddings; windows: it attends through sliding windows; activation: what feed-forwards compute, by
    `Activation.name`; biases: of which tensors, None for any; llama3, longrope: reads these rope scalings; expert_width:
    experts' width has a key of its own; keys: more metadata, from the config; problems: what else of a config it cannot say.
    The other way round, with the metadata of a file (`compress.models.gguf.keys`): claims: whether it is this family's, of
    those of one architecture; read: keys of config.json beyond those that the schema has tables for.
    """

    arch: str
    variants: tuple[tuple[str, Callable[[Any], bool]], ...] = field(default=(), kw_only=True)
    normalises: bool | None = None
    dense_layers: bool = True
    heads_fill_width: bool = False
    tied: bool = True
    activation: str = "silu"
    windows: bool = False
    biases: tuple[str, ...] | None = ()
    llama3: bool = False
    longrope: bool = False
    expert_width: bool = True
    keys: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    problems: Callable[[Any], list[str]] = lambda config: []
    claims: Callable[[Any], bool] = lambda metadata: True
    read: Callable[[Any], Mapping[str, Any]] = lambda metadata: {}

    @property
    def archs(self) -> tuple[str, ...]:
        """All of the family's architectures."""
        return (self.arch, *(name for name, _ in self.variants))


@dataclass(frozen=True)
class Draft:
    """The layer that predicts a further token (multi-token prediction), as checkpoints hold it beside the decoder and llama.cpp
    reads it behind the last block.

    root: what the names of its block begin with; block: its sub-layers; others: its other tensors under their whole names, with
    what GGUF calls them in the block.
    """

    root: str
    block: tuple[Sublayer, ...]
    others: tuple[Weight, ...]


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the tensors outside of its blocks, without ".weight", and what those of block {n} begin with;
    norm_gguf: what GGUF calls the last norm."""

    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    block: str = "model.layers.{n}."
    norm_gguf: str = "output_norm"


USUAL = Names()


@dataclass(frozen=True)
class Ends:
    """What a model computes in front of its blocks and behind them, beside a lookup, a norm and a product.

    scale: what embeddings are multiplied by; divisor: what logits are divided by; softcap: the c of c tanh(x / c) that then
    bounds them, None for none.
    """

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None
