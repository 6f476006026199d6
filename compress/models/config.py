"""config.json as families read it: one schema a family, composed of the groups of keys below, and what follows from them.

Kinds and ranges are the fields' own; keys that contradict each other, or that no model could have together, are told by
`contradictions`. Unknown keys are left alone. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

from compress.errors import ConfigError, UnsupportedModel
from compress.limits import EXPERTS, EXPERTS_IN_ALL, HEADS, LAYERS, POSITIONS, ROWS, WIDTH
from compress.models.layers.rope import Rope
from compress.reading import dotted, shortened, wrong

Width = Annotated[int, Field(ge=1, le=WIDTH)]
Channels = Annotated[int, Field(ge=0, le=WIDTH)]
Heads = Annotated[int, Field(ge=1, le=HEADS)]
Layers = Annotated[int, Field(ge=0, le=LAYERS)]
Experts = Annotated[int, Field(ge=0, le=EXPERTS)]
Positions = Annotated[int, Field(ge=1, le=POSITIONS)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
Scale = Annotated[float, Field(ge=0, le=1e30)]
Chosen = Annotated[int, Field(ge=1, le=EXPERTS)]
Shared = Annotated[int, Field(ge=0, le=EXPERTS)]
Eps = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def _tokens(value: Any) -> Any:
    ids = value if isinstance(value, list) else [value]
    if not all(type(id) is int and abs(id) < 2**31 for id in ids):
        raise PydanticCustomError("tokens", "expected a token's id or a list of ids")
    return value


Tokens = Annotated[Any, AfterValidator(_tokens)]


Word = Annotated[str, Field(max_length=64)]


class Keys(BaseModel):
    """Base of everything that is read: frozen, no kind bent into another, unknown keys left alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)


class RopeKeys(Keys):
    """Parameters of rotary positions, in both generations of configs."""

    rope_type: Word | None = None
    type: Word | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Share | None = None
    factor: Positive | None = None
    alpha: Positive | None = None
    original_max_position_embeddings: Positions | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    mscale: Scale | None = None
    mscale_all_dim: Scale | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    mrope_section: Annotated[list[Channels], Field(min_length=3, max_length=4)] | None = None
    truncate: bool | None = None
    full_attention: RopeKeys | None = None
    sliding_attention: RopeKeys | None = None

    KINDS: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    """Kinds of layers that may have parameters of their own."""
    NEEDS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": ("long_factor", "short_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"

    def contradictions(self, name: str) -> Iterator[str]:
        if self.rope_type and self.type and self.rope_type != self.type:
            yield f"{name}.rope_type is {self.rope_type!r} and {name}.type {self.type!r}; leave one of them out"
        for key in self.NEEDS.get(self.kind, ()):
            if getattr(self, key) is None:
                yield f"{name}.{key}: missing, rope scaling {self.kind!r} needs it"
        if self.factor is not None and self.kind in self.NEEDS and self.factor < 1:
            yield f"{name}.factor: must be at least 1, got {self.factor:g}"
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            yield f"{name}.high_freq_factor: must differ from low_freq_factor"
        for kind in self.KINDS:
            nested: RopeKeys | None = getattr(self, kind)
            yield from nested.contradictions(f"{name}.{kind}") if nested is not None else ()


class QuantizationKeys(Keys):
    """What already quantized checkpoints say."""

    quant_method: Word | None = None


class Config(Keys):
    """The keys of every family: a decoder with grouped-query attention.

    GGUF: keys of GGUF's metadata, without the architecture's name, that say the same as those of config.json, "" for a key of a
    base that does not; GGUF_HAS: names of GGUF's tensors whose presence says it.
    """

    GGUF: ClassVar[Mapping[str, str]] = {
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {}
    LAYER_ROPES: ClassVar[bool] = False
    """Whether kinds of layers may have rotary parameters of their own."""

    model_type: str
    architectures: list[str] | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    hidden_size: Width
    num_hidden_layers: Annotated[int, Field(ge=1, le=LAYERS)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    intermediate_size: Width
    vocab_size: Annotated[int, Field(ge=1, le=ROWS)]
    tie_word_embeddings: bool = False
    max_position_embeddings: Positions = 2048
    rms_norm_eps: Eps = 1e-6
    rope_theta: Positive = 10000.0
    partial_rotary_factor: Share = 1.0
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: Tokens | None = None
    eos_token_id: Tokens | None = None
    pad_token_id: Tokens | None = None
    quantization_config: QuantizationKeys | None = None

    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """A raw config.json; null stands for a key's default where null is no value of its own.

        Raises ConfigError with every key that is missing, of another kind or out of range.
        """
        nulls = _nullable(cls)
        try:
            config = cls.model_validate({k: v for k, v in given.items() if v is not None or k in nulls})
        except ValidationError as error:
            faults = error.errors(include_url=False)
            problems = [f"{dotted(fault['loc'])}: {_wrong(fault)}" for fault in faults]
            raise ConfigError(shortened(problems)) from None
        config._given = given
        return config

    def having(self, **values: Any) -> Self:
        """The same with other values of some keys, where config.json says them in other words. They are not checked."""
        return self.model_copy(update=values)

    def contradictions(self) -> Iterator[str]:
        """What keys say against each other."""
        if self.heads % self.kv_heads:
            yield (
                f"num_attention_heads: {self.heads} heads cannot share the {self.kv_heads} of num_key_value_heads evenly"
            )
        for name, rope in (("rope_parameters", self.rope_parameters), ("rope_scaling", self.rope_scaling)):
            yield from rope.contradictions(name) if rope is not None else ()
        yield from self._rope_contradictions()

    def _rope_contradictions(self) -> Iterator[str]:
        """Rotary parameters may be written down in three places."""
        both = {name: self._given.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
        for name, rope in both.items():
            known = RopeKeys.KINDS if self.LAYER_ROPES else ()
            for key in (key for key, value in rope.items() if isinstance(value, dict) and key not in known):
                yield f"{name}.{key}: rotary parameters of some layers alone are not supported"
        top = {key: self._given.get(key) for key in ("rope_theta", "partial_rotary_factor")}
        for key in dict.fromkeys((*top, *both["rope_parameters"], *both["rope_scaling"])):
            said = {f"{name}.{key}": rope[key] for name, rope in both.items() if rope.get(key) is not None}
            if top.get(key) is not None:
                said[key] = top[key]
            if any(value != next(iter(said.values())) for value in said.values()):
                yield f"{' and '.join(f'{name} is {value!r}' for name, value in said.items())}; leave the wrong one out"
        kinds = {rope.kind for rope in (self.rope_parameters, self.rope_scaling) if rope is not None}
        if len(kinds) > 1:
            yield f"rope_parameters and rope_scaling are of two kinds, {' and '.join(sorted(kinds))}; leave one of them out"

    @cached_property
    def text(self) -> str:
        """What was given, as JSON: sub-layers that transformers has a say in keep it."""
        return json.dumps(dict(self._given), sort_keys=True)

    @property
    def hidden(self) -> int:
        return self.hidden_size

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def eps(self) -> float:
        return self.rms_norm_eps

    @property
    def experts(self) -> int:
        """Routed experts a layer."""
        return 0

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        """Parameters of both generations of configs as given, theta among them; kind: of layers."""
        table = self._given.get("rope_parameters") or {}
        shared = {key: value for key, value in table.items() if not isinstance(value, dict)}
        return {**shared, **(table.get(kind) or {}), **(self._given.get("rope_scaling") or {})}

    def parameter(self, key: str) -> Any:
        """One of the rope parameters, None where it is not given."""
        return self._rope().get(key)

    @property
    def theta(self) -> float:
        return self._theta()

    def _theta(self, kind: str = "") -> float:
        return float(self._rope(kind).get("rope_theta") or self.rope_theta)

    @property
    def scaling(self) -> Mapping[str, Any] | None:
        """The parameters of a rope scaling, None without one."""
        return self._scaling()

    def _scaling(self, kind: str = "") -> Mapping[str, Any] | None:
        rope = {k: v for k, v in self._rope(kind).items() if k != "rope_theta"}
        return None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope

    @property
    def turning_share(self) -> float:
        """The part of a head that rotary positions turn."""
        return self._rope().get("partial_rotary_factor") or self.partial_rotary_factor

    def rope(self, dim: int | None = None, kind: str = "") -> Rope:
        """Rotary positions on `dim` channels of a head, all by default; kind: of layers, where kinds have parameters of their
        own.

        Raises UnsupportedModel where they cannot come in pairs, or where the config turns a part of them only and the family
        has not said that it knows.
        """
        if dim is None and self.turning_share != 1.0:
            raise UnsupportedModel("partial_rotary_factor other than 1 is not supported")
        dim = self.head_width if dim is None else dim
        if dim < 2 or dim % 2:
            raise UnsupportedModel(f"config.json: {dim} channels of a head cannot turn in pairs; is head_dim right?")
        given = self._scaling(kind)
        scaling = "" if given is None else json.dumps(dict(given), sort_keys=True)
        own, config = (self._rope_kind(kind), self.text) if scaling else ("", "")
        return Rope(dim, self._theta(kind), self.max_position_embeddings, scaling, config, own)

    def _rope_kind(self, kind: str) -> str:
        """The kind of layers by which transformers looks the parameters up, "" for none."""
        return kind if isinstance((self._given.get("rope_parameters") or {}).get(kind), dict) else ""


class EvenHeads(Config):
    """Heads are as wide as config.json says, or divide the hidden size."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            yield (
                f"num_attention_heads: {self.heads} heads do not divide the hidden_size of {self.hidden_size}, and there is no "
                "head_dim"
            )


class Windows(Config):
    """Layers may attend through a sliding window."""

    sliding_window: Channels | None = None
    use_sliding_window: bool = True
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    max_window_layers: Layers = 28

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.layer_types, self.layers)

    def widest(self) -> int | None:
        """The width of the model's sliding windows, None where it has none; null and 0 mean none, absent the default."""
        return (self.sliding_window or None) if self.use_sliding_window else None

    def window(self, layer: int, rule: Literal["all", "late", "even"] = "all") -> int | None:
        """The window of one layer. rule: "all" layers slide; or as layer_types says and, without it, "late" (from
        max_window_layers on) or "even" (even layers below it)."""
        first = self.max_window_layers
        if rule == "all":
            slides = True
        elif self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = layer >= first if rule == "late" else layer % 2 == 0 and layer < first
        return self.widest() if slides else None


class Routed(Config):
    """Mixtures of experts; their number goes by several names, and saved configs carry any of them."""

    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    n_routed_experts: Experts | None = None
    num_experts_per_tok: Chosen
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool = False

    COUNTS: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts", "n_routed_experts")
    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }

    @property
    def experts(self) -> int:
        """By the first name that config.json gives, else the family's own number."""
        known = [name for name in self.COUNTS if getattr(self, name)]
        given = [name for name in known if name in self.model_fields_set]
        return next((getattr(self, name) for name in given or known), 0)

    @property
    def expert_width(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        given = {n: getattr(self, n) for n in self.COUNTS if n in self.model_fields_set and getattr(self, n)}
        if len(set(given.values())) > 1:
            yield f"{' and '.join(f'{name} is {value}' for name, value in given.items())}; leave the wrong one out"
        if self.experts and self.num_experts_per_tok > self.experts:
            yield f"num_experts_per_tok: {self.num_experts_per_tok} of {self.experts} experts cannot be chosen"
        if self.experts * self.layers > EXPERTS_IN_ALL:
            yield (
                f"num_hidden_layers: {self.layers} layers of {self.experts} experts are more than the {EXPERTS_IN_ALL:,} "
                "experts that are read"
            )
        if not (self.moe_intermediate_size or self.intermediate_size):
            yield "moe_intermediate_size: missing, and intermediate_size is 0"


class Sparse(Routed):
    """Which layers have experts, by the keys that Qwen's configs say it with."""

    GGUF: ClassVar[Mapping[str, str]] = {"num_experts": "expert_count"}

    mlp_only_layers: list[Layers] | None = None
    decoder_sparse_step: Annotated[int, Field(ge=1, le=LAYERS)] = 1

    def is_sparse(self, layer: int) -> bool:
        dense = layer in (self.mlp_only_layers or ())
        return bool(self.experts) and not dense and (layer + 1) % self.decoder_sparse_step == 0


def one_a_layer(kinds: list[Any] | None, layers: int, key: str = "layer_types") -> Iterator[str]:
    if kinds is not None and len(kinds) != layers:
        yield f"{key}: a list of {len(kinds)} for the {layers} layers of num_hidden_layers"


@cache
def _nullable(schema: type[BaseModel]) -> frozenset[str]:
    """The keys that may be null."""
    return frozenset(k for k, f in schema.model_fields.items() if type(None) in get_args(f.annotation))


def _wrong(fault: Any) -> str:
    return "missing; is config.json complete?" if fault["type"] == "missing" else wrong(fault)
