"""Declarations of a transformer block's sub-layers: tensors, inputs, folds, axes, GGUF names. No torch.

A block is a chain of residual sub-layers, x + f(norm(x)): a token mixer, then a feed-forward, or one of them alone; some
families have a norm behind f as well, or only there. A `Sublayer` says what one of them is made of, and everything outside
`compress.models` reads that instead of taking names apart: which activations become known when, what multiplies the same input,
what a scale may be folded into, what reads and writes the residual stream, what can be pruned together, what engines fuse, how
GGUF calls and orders it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import ClassVar, Literal, Self

from compress.models.layers.views import Map, Piece

Place = Literal["attention.in", "attention.out", "ffn.in", "ffn.act"]
"""A recipe's words for the inputs of a block's linears: what the mixer reads, what its output projection reads, what the
feed-forward reads, what its down projection reads."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of a tensor that shrinks when parts of the model are pruned.

    of: what is counted along it, "kv_heads", "experts" or a feed-forward ("mlp", "shared", "experts.3"), whose channels are
    counted; run: entries a part.
    """

    of: str
    run: int = 1


@dataclass(frozen=True, slots=True)
class Input:
    """Activations that one group of linears multiplies.

    key: unique in the block; width: n; stage: when they become known, counted within the sub-layer: those of a stage depend
    on linears of earlier stages only; place: the recipe's word; signs: inputs of a block with the same word share the
    random signs of their Hadamard transforms. expert: the routed expert, whose tokens these are; pool: the key whose
    moments stand in for an expert that saw few tokens; part_of: the key of the activations that these are some rows of;
    counts: these rows are counted as the expert's tokens.
    made_by: tensors whose rows produce the channels, so that a scale may be folded into them; heads, head_dim: channels are
    ordered [groups, heads, head_dim] where several share a producing row of [groups, head_dim].
    """

    key: str
    width: int
    stage: int
    place: Place
    signs: str
    expert: int | None = None
    pool: str | None = None
    part_of: str | None = None
    counts: bool = False
    made_by: tuple[str, ...] = ()
    heads: int = 1
    head_dim: int = 1


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a tensor lies in a checkpoint that fuses or renames it: rows start..stop, every `step`-th of them, of entry `index`
    of tensor `name`, relative to the block. transposed: stored as [in, out]."""

    name: str
    index: int | None = None
    start: int = 0
    stop: int | None = None
    transposed: bool = False
    step: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is that tensor as it is."""
        return self == Slice(self.name)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a sub-layer; names are relative to its block.

    input: key of the activations it multiplies, None for norms, biases and what no solver sees. reads: the norm through
    which it reads the residual stream; writes: what it computes is added to the stream; alone: and stands for all that
    its sub-layer adds, times `Sublayer.residual`, so that it can make up for what the stream lags. stream_norm: a norm of the
    stream itself.
    values: the dimension that a rotation of value heads turns. shift: what the model adds to the stored numbers.
    axes: of each dimension, what shrinks it. fused: what engines multiply it together with, in words. slices: where it lies
    in checkpoints that fuse it; stacked: transformers reads it from the first of them only. pieces: how GGUF stores it, where
    that is not the tensor as it is, under `gguf`.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    gguf: str
    input: str | None = None
    expert: int | None = None
    reads: str | None = None
    writes: bool = False
    alone: bool = False
    stream_norm: bool = False
    values: int | None = None
    shift: float = 0.0
    axes: tuple[Axis | None, ...] = ()
    fused: str | None = None
    slices: tuple[Slice, ...] = ()
    stacked: bool = False
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Past:
    """What engines keep of the tokens that a sub-layer has seen while they generate.

    token: values of every token: keys and values of all heads, or the latent that they are made of; row: channels that lie
    together, which the blocks of a quantized cache must divide; window: tokens that are looked back at, None for all; state:
    float32 values that stand for all tokens, whatever their number; expanded: values of every token where keys and values are
    kept that others make anew of a latent, 0 where nobody does; scored: every token is scored before any are read.
    """

    token: int = 0
    row: int = 0
    window: int | None = None
    state: int = 0
    expanded: int = 0
    scored: bool = False


GgufValue = int | float | bool | str | tuple[int, ...] | tuple[bool, ...]


@dataclass(frozen=True)
class Sublayer:
    """Base of all sub-layers: (x + residual * post(f(norm(x)))) * scalar of the residual stream x, [..., hidden].

    norm, norm_gguf: the norm in front, "" for none; post, post_gguf: the norm behind, likewise; norm_shift: what the model
    adds to the stored weights of both; residual: what the sum is multiplied by before it joins the stream; scalar,
    scalar_gguf: the tensor [1] that the whole stream is multiplied by behind it, "" for none; stored: names of
    tensors here and in checkpoints that call them otherwise, see `stored_as`.
    """

    hidden: int
    norm: str
    norm_gguf: str
    norm_shift: float = field(default=0.0, kw_only=True)
    post: str = field(default="", kw_only=True)
    post_gguf: str = field(default="", kw_only=True)
    residual: float = field(default=1.0, kw_only=True)
    scalar: str = field(default="", kw_only=True)
    scalar_gguf: str = field(default="", kw_only=True)
    stored: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    half: ClassVar[str]
    """"attention" or "ffn": its place in the block, for messages and files."""
    forward: ClassVar[str]
    """The module of `compress.models.forward` that computes it."""

    def inputs(self) -> Iterator[Input]:
        """All inputs, stage by stage."""
        raise NotImplementedError

    def tensors(self) -> Iterator[Weight]:
        """All tensors but the norms in front and behind, in execution order."""
        raise NotImplementedError

    def past(self) -> Past:
        """What is kept of past tokens; nothing, unless it mixes tokens."""
        return Past()

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        """What GGUF's metadata says of it, keys without the architecture's name."""
        return {}

    @property
    def reads(self) -> str | None:
        """The norm through which its linears read the stream, None where they read it as it is."""
        return f"{self.norm}.weight" if self.norm else None

    @property
    def made_by(self) -> tuple[str, ...]:
        """What makes its first input, so that a scale may be folded into it: the norm in front."""
        return () if self.reads is None else (self.reads,)

    @property
    def fixed_stream(self) -> str:
        """Why the stream that it adds to cannot be rotated, "" where it can."""
        weighs = f"the norm behind the {self.half} half of a block weighs single channels of the residual stream"
        return weighs if self.post else ""

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All tensors, the norm in front first, the one behind last."""
        names = dict(self.stored)
        inside = (replace(w, alone=False) if w.alone and (self.post or self.scalar) else w for w in self.tensors())
        scalar = (Weight(self.scalar, (1,), "small", self.scalar_gguf),) if self.scalar else ()
        norms = self._norm(self.norm, self.norm_gguf, stream_norm=True), self._norm(self.post, self.post_gguf)
        return tuple(
            replace(weight, slices=(Slice(names[weight.name]),)) if weight.name in names else weight
            for weight in (*norms[0], *inside, *norms[1], *scalar)
        )

    def _norm(self, name: str, gguf: str, stream_norm: bool = False) -> Iterator[Weight]:
        shift, gguf = self.norm_shift, f"{gguf}.weight"
        if name:
            yield Weight(
                f"{name}.weight", (self.hidden,), "norms", gguf, stream_norm=stream_norm, shift=shift,
                pieces=shifted(gguf, shift),
            )  # fmt: skip

    def stored_as(self, names: Mapping[str, str]) -> Self:
        """The same where checkpoints have other names: name here -> name there, both relative to the block. Names of other
        sub-layers do no harm."""
        return replace(self, stored=tuple(names.items()))

    @cached_property
    def samples(self) -> tuple[Weight, ...]:
        """Its tensors, those of the first routed expert for all of them."""
        return tuple(weight for weight in self.weights if not weight.expert)

    @cached_property
    def parameters(self) -> int:
        """Of all tensors."""
        return sum(prod(weight.shape) for weight in self.weights)

    @cached_property
    def known(self) -> Mapping[str, Input]:
        """The inputs by key."""
        return {i.key: i for i in self.inputs()}

    @cached_property
    def signs(self) -> Mapping[str | None, str]:
        """Key of an input -> the word under which it shares random signs."""
        return {None: "", **{i.key: i.signs for i in self.known.values()}}

    @cached_property
    def stages(self) -> int:
        """How many times inputs become known."""
        return 1 + max(i.stage for i in self.known.values())


def shifted(gguf: str, shift: float) -> tuple[Piece, ...]:
    """GGUF holds norms as the model uses them."""
    return (Piece(gguf, map=Map("shift", shift)),) if shift else ()


def linear(
    name: str, rows: int, columns: int, role: str, gguf: str, key: str, bias: bool = False, **facts: object
) -> Iterator[Weight]:
    """A linear's weight and, where it has one, its bias, which shares its rows' facts."""
    weight = Weight(f"{name}.weight", (rows, columns), role, f"{gguf}.weight", key, **facts)  # type: ignore[arg-type]
    yield weight
    if bias:
        yield Weight(
            f"{name}.bias",
            (rows,),
            "biases",
            f"{gguf}.bias",
            expert=weight.expert,
            writes=weight.writes,
            values=0 if weight.values == 0 else None,
            axes=weight.axes[:1],
            pieces=tuple(piece.of_rows() for piece in weight.pieces),
        )
