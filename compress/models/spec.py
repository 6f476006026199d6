"""What a model is, read from config.json alone: no weights, no torch.

A `Family` composes sub-layers (`compress.models.layers`) block by block; `load_spec` turns a raw config into a `ModelSpec`,
which lists every tensor with its role and what its sub-layer declares of it. Adding a family is one file in `families` with a
`FAMILY` in it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from compress.errors import ConfigError, UnsupportedModel
from compress.models.around import USUAL, Draft
from compress.models.around import Ends as Ends
from compress.models.around import Gguf as Gguf
from compress.models.around import Names as Names
from compress.models.config import Config, Routed, Windows
from compress.models.layers.base import Input, Sublayer, Weight, shifted
from compress.models.layers.moe import MoE
from compress.models.layers.views import Order, Piece
from compress.models.wrappers import Wrapper, text_config, wrapper_of
from compress.reading import in_words

Block = tuple[Sublayer, ...]
PLAIN = Weight("", (), "", "")
MTP = "MTP"
"""Heads that predict further tokens (multi-token prediction), as what a tensor belongs to."""
CARRIED = "carried"
"""The role of tensors that ship as they are."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint.

    `input` names the activations a 2-D weight multiplies; weights with the same layer and `input` share their
    statistics (q/k/v; gate/up of one expert). None for embeddings, norms and biases. part: index of its sub-layer in the block;
    declared: what that says of it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    expert: int | None
    gguf: str
    input: str | None
    part: int = 0
    declared: Weight = PLAIN
    signs: str = ""
    """Tensors of a layer with the same word share the random signs of their inputs' Hadamard transform."""
    beside: str = ""
    """What it belongs to where that is no part of the decoder: MTP, or a part of a multimodal model by its name."""

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def carried(self) -> bool:
        """Whether it ships as it is, whatever a recipe says."""
        return self.role == CARRIED

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What GGUF stores it as, under full names: itself, as a rule."""
        if not self.declared.pieces:
            return (Piece(self.gguf),)
        prefix = self.gguf.removesuffix(self.declared.gguf)
        return tuple(replace(piece, name=prefix + piece.name) for piece in self.declared.pieces)

    @property
    def column_order(self) -> Order | None:
        """GGUF's order of its columns, where that is another than the checkpoint's."""
        return next((piece.columns for piece in self.declared.pieces if piece.columns is not None), None)


@dataclass(frozen=True)
class Family:
    """One architecture family: what its blocks are composed of.

    config: the schema of its config.json, with the values of absent keys as transformers fills them in. block(config, layer):
    the sub-layers of one block. names, ends(config): see `Names` and `Ends`; final_shift: what the model adds to the stored
    weights of the last norm. experts_key, shared_key: the config's names for the number of experts and the width of the shared
    one. fixed_heads, fixed_channels: why these cannot be pruned, "" where they can. example: keys of config.json that have no
    defaults, with which a model of it can be composed that stands for all.
    """

    model_types: tuple[str, ...]
    hf_architecture: str
    gguf: Gguf
    block: Callable[[Any, int], Block]
    config: type[Config] = Config
    names: Names = USUAL
    ends: Callable[[Any], Ends] = lambda config: Ends()
    final_shift: float = 0.0
    fixed_heads: str = ""
    fixed_channels: str = ""
    experts_key: tuple[str, ...] = ("n_routed_experts", "num_experts", "num_local_experts")
    shared_key: str = "shared_expert_intermediate_size"
    draft: Callable[[Any], Draft] | None = None
    """The layer that predicts a further token, where llama.cpp's architecture has a place for it."""
    also: tuple[str, ...] = ()
    """Model types that are the first of `model_types` under another name, which what ships then says."""
    example: Mapping[str, Any] = field(default_factory=dict)
    heads_divide_width: bool = False
    """transformers refuses configurations whose heads do not divide the hidden size."""

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Values of absent config keys."""
        fields = self.config.model_fields.items()
        return {key: f.default for key, f in fields if not f.is_required() and f.default is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A parsed config.json.

    config: the language model's own; blocks: the sub-layers of every block. The counts are those of config.json, which
    pruning changes; a model without a kind of part has none of it. wrapper, wrapping: the multimodal model around it, and its
    config.json; beside: tensors of the checkpoint that are no part of the decoder and go along with it.
    """

    family: Family
    config: Mapping[str, Any]
    blocks: tuple[Block, ...]
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    max_positions: int
    sliding_window: int | None
    sparse_layers: frozenset[int]
    wrapper: Wrapper | None = None
    wrapping: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[TensorSpec, ...] = ()

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @cached_property
    def read(self) -> Config:
        """The config as its family's schema reads it."""
        return self.family.config.read(self.config)

    @cached_property
    def gguf_arch(self) -> str:
        """llama.cpp's architecture for it."""
        gguf = self.family.gguf
        return next((name for name, fits in gguf.variants if fits(self.read)), gguf.arch)

    @cached_property
    def ends(self) -> Ends:
        """What is computed in front of the blocks and behind them."""
        return self.family.ends(self.read)

    @cached_property
    def fixed_stream(self) -> str:
        """Why the residual stream cannot be rotated, "" where it can."""
        return next((why for block in self.blocks for s in block if (why := s.fixed_stream)), "")

    @property
    def norm_topk(self) -> bool:
        """Whether the chosen experts' weights are divided by their sum."""
        return any(s.router.normalised for block in self.blocks for s in block if isinstance(s, MoE))

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` has routed experts instead of a dense MLP."""
        return layer in self.sparse_layers

    def untied(self) -> ModelSpec:
        """The same model with a head of its own."""
        said = dict.fromkeys(("tie_word_embeddings", *({"tie_embedding"} & self.config.keys())), False)
        return replace(self, tied=False, config={**self.config, **said})

    def like(self, config: Mapping[str, Any]) -> ModelSpec:
        """A model of another shape in the same wrapper. config: the language model's own."""
        inside = load_spec(config)
        return replace(inside, wrapper=self.wrapper, wrapping=self.wrapping, beside=self.beside)

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The whole config.json, with what a wrapper has around the language model's."""
        if self.wrapper is None:
            return self.config
        return {**self.wrapping, "tie_word_embeddings": self.tied, "text_config": dict(self.config)}

    @property
    def architecture(self) -> str:
        """The class of transformers that loads the checkpoint."""
        return self.family.hf_architecture if self.wrapper is None else self.wrapper.architecture

    @property
    def loader(self) -> str:
        """transformers' class that opens a folder of it, whatever its model_type."""
        return "AutoModelForCausalLM" if self.wrapper is None else "AutoModelForImageTextToText"

    @cached_property
    def names(self) -> Names:
        """What tensors outside the sub-layers are called, and blocks."""
        return self.family.names if self.wrapper is None else self.wrapper.around(self.family.names)

    def branches(self, layer: int) -> tuple[Branch, ...]:
        """The sub-layers of a block, at their places."""
        return self._branches[layer]

    @cached_property
    def _branches(self) -> tuple[tuple[Branch, ...], ...]:
        return tuple(
            tuple(Branch(self, layer, part) for part in range(len(block))) for layer, block in enumerate(self.blocks)
        )

    @cached_property
    def outer(self) -> tuple[TensorSpec, ...]:
        """Embeddings, final norm, and the head where it is not tied."""
        vocabulary, width = (self.vocab_size, self.hidden_size), (self.hidden_size,)

        def one(declared: Weight) -> TensorSpec:
            given = (declared.name, declared.shape, declared.role, None, None, declared.gguf, declared.input)
            return TensorSpec(*given, declared=declared, signs=declared.input or "")

        shift, names = self.family.final_shift, self.names
        norm, gguf = f"{names.norm}.weight", f"{names.norm_gguf}.weight"
        found = (
            one(Weight(f"{names.embeddings}.weight", vocabulary, "embeddings", "token_embd.weight")),
            one(Weight(norm, width, "norms", gguf, stream_norm=True, shift=shift, pieces=shifted(gguf, shift))),
            one(Weight(f"{names.head}.weight", vocabulary, "lm_head", "output.weight", "lm_head", reads=norm)),
        )
        return found[:2] if self.tied else found

    @property
    def embeddings(self) -> str:
        """Name of the embedding table."""
        return self.outer[0].name

    @property
    def final_norm(self) -> str:
        """Name of the norm in front of the head."""
        return self.outer[1].name

    @property
    def head(self) -> str:
        """Name of the head's matrix, which tied models have in their embeddings."""
        return self.outer[-1].name if not self.tied else self.embeddings

    @cached_property
    def _tensors(self) -> tuple[TensorSpec, ...]:
        inside = (tensor for layer in range(self.layers) for tensor in self.block_tensors(layer))
        return (self.outer[0], *inside, *self.outer[1:], *self.beside)

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor in execution order: embeddings, blocks, final norm, head (absent when tied), what stands beside."""
        return self._tensors

    @cached_property
    def parameters(self) -> int:
        """Of all tensors."""
        inside = sum(sublayer.parameters for block in self.blocks for sublayer in block)
        return inside + sum(t.parameters for t in (*self.outer, *self.beside))

    def block_tensors(self, layer: int) -> tuple[TensorSpec, ...]:
        """Tensors of one decoder block."""
        return tuple(t for branch in self.branches(layer) for t in branch.tensors)

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        return {t.name: t for t in self.tensors()}


@dataclass(frozen=True, eq=False)
class Branch:
    """One sub-layer at its place in a model: the residual branch `part` of block `layer`."""

    spec: ModelSpec = field(repr=False)
    layer: int
    part: int

    @property
    def sublayer(self) -> Sublayer:
        return self.spec.blocks[self.layer][self.part]

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Its inputs by key."""
        return self.sublayer.known

    @property
    def root(self) -> str:
        """What its tensors' names begin with."""
        return self.spec.names.block.format(n=self.layer)

    @property
    def last(self) -> bool:
        """Whether it is the last of its block."""
        return self.part == len(self.spec.blocks[self.layer]) - 1

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self._placed(self.sublayer.weights)

    @property
    def samples(self) -> tuple[TensorSpec, ...]:
        """Its tensors, those of the first routed expert for all of them."""
        return self._placed(self.sublayer.samples)

    def _placed(self, weights: Iterable[Weight]) -> tuple[TensorSpec, ...]:
        root, gguf, signs = self.root, f"blk.{self.layer}.", self.sublayer.signs
        return tuple(
            TensorSpec(
                root + w.name,
                w.shape,
                w.role,
                self.layer,
                w.expert,
                gguf + w.gguf,
                w.input,
                self.part,
                w,
                signs[w.input],
            )
            for w in weights
        )

    def __str__(self) -> str:
        return f"the {self.sublayer.half} half of block {self.layer}"


_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family from outside known. Raises ValueError when one of its model types is taken."""
    taken = [name for name in family.model_types if known_families().get(name, family) is not family]
    if taken:
        raise ValueError(f"there is a family for {taken[0]} already")
    _REGISTERED.update(dict.fromkeys(family.model_types, family))
    return family


_FOUND: dict[str, Family] = {}


def known_families() -> Mapping[str, Family]:
    """model_type -> Family: those of the folder `families`, and the registered ones."""
    if not _FOUND:
        package = importlib.import_module("compress.models.families")
        for module in pkgutil.iter_modules(package.__path__):
            family = importlib.import_module(f"compress.models.families.{module.name}").FAMILY
            _FOUND.update(dict.fromkeys(family.model_types, family))
    return {**_FOUND, **_REGISTERED}


def load_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Parse a raw config.json, of a language model or of a multimodal one around it.

    Raises UnsupportedModel for an unknown `model_type` (listing the supported ones) or an unsupported option, ConfigError for
    one that is incomplete, of wrong kinds, or contradicts itself.
    """
    wrapper = wrapper_of(config)
    if wrapper is not None:
        return replace(load_spec(text_config(config)), wrapper=wrapper, wrapping=dict(config))
    model_type = in_words(config.get("model_type")).strip("'")
    known = known_families()
    aliases = {other: family.model_types[0] for family in known.values() for other in family.also}
    if model_type in aliases:
        model_type = aliases[model_type]
        config = {**config, "model_type": model_type}
    if model_type not in known:
        names = [*known, *aliases]
        near = difflib.get_close_matches(str(model_type), names, 1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported{hint}; supported: {', '.join(sorted(names))}"
        )
    family = known[model_type]
    c = family.config.read(config)
    if problems := [*c.contradictions(), *_foreign(family, c)]:
        raise ConfigError(problems)
    same: dict[Sublayer, Sublayer] = {}  # blocks alike share what their sub-layers cache
    blocks = tuple(tuple(same.setdefault(s, s) for s in family.block(c, layer)) for layer in range(c.layers))
    mixtures = {n: s for n, block in enumerate(blocks) for s in block if isinstance(s, MoE)}
    experts = next(iter(mixtures.values()), None)
    shared = experts.shared.width if experts is not None and experts.shared is not None else 0
    return ModelSpec(
        family=family,
        config=dict(config),
        blocks=blocks,
        hidden_size=c.hidden,
        layers=c.layers,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_width,
        vocab_size=c.vocab_size,
        intermediate_size=c.intermediate_size,
        experts=c.experts,
        experts_per_token=c.num_experts_per_tok if isinstance(c, Routed) and c.experts else 0,
        moe_intermediate_size=c.expert_width if isinstance(c, Routed) and c.experts else c.intermediate_size,
        shared_intermediate_size=shared or getattr(c, family.shared_key, 0),
        norm_eps=c.eps,
        rope_theta=c.theta,
        rope_scaling=c.scaling,
        tied=c.tie_word_embeddings,
        max_positions=c.max_position_embeddings,
        sliding_window=c.widest() if isinstance(c, Windows) else None,
        sparse_layers=frozenset(mixtures),
    )


def _foreign(family: Family, c: Config) -> Iterator[str]:
    """What config.json says that another class of transformers would load."""
    if family.heads_divide_width and c.hidden_size % c.heads:
        yield f"num_attention_heads: transformers wants {c.heads} heads to divide the hidden_size of {c.hidden_size}"
    own, names = family.hf_architecture, c.architectures or [family.hf_architecture]
    if own in names:
        return
    others = {other.hf_architecture for other in known_families().values()}
    kin = own.removesuffix(CAUSAL).lower()
    if not any(n.endswith(CAUSAL) and kin in n.lower() and n not in others for n in names):
        yield (
            f"architectures: {in_words(', '.join(names))} is no causal language model of model_type {c.model_type}; "
            f"{own} is"
        )


CAUSAL = "ForCausalLM"
