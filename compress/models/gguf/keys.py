"""What GGUF's metadata says of an architecture: as a model's declarations have it, and as a file does."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compress.errors import CheckpointError
from compress.limits import LAYERS
from compress.models.spec import MTP, ModelSpec
from compress.reading import in_words

# Where the first versions of the writer put what sub-layers declare; other keys follow in the order of their declaration.
_ORDER = (
    "vocab_size", "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "attention.sliding_window", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length",
)  # fmt: skip


_BY_LAYER = (
    "attention.recurrent_layers", "attention.sliding_window_pattern", "attention.head_count", "attention.head_count_kv",
    "feed_forward_length",
)  # fmt: skip
"""Keys that may have a value for each block."""


def drafts_in(spec: ModelSpec) -> int:
    """Layers behind the model's own that predict further tokens, of those that go along with it."""
    return int(any(tensor.beside == MTP and tensor.gguf for tensor in spec.beside))


def architecture_keys(spec: ModelSpec, drafts: int = 0) -> dict[str, Any]:
    """Metadata of the architecture, without its name in front: the model's, its sub-layers', its family's own. drafts: layers
    behind the model's own; of what is said layer by layer they are like the last one."""
    keys: dict[str, Any] = {}
    for sublayer in dict.fromkeys(s for block in spec.blocks for s in block):
        for key, value in sublayer.gguf_keys().items():
            keys.setdefault(key, value)
    keys |= {
        "vocab_size": spec.vocab_size,
        "block_count": spec.layers,
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
    }
    if spec.intermediate_size:
        keys["feed_forward_length"] = spec.intermediate_size
    if spec.sliding_window:
        keys["attention.sliding_window"] = spec.sliding_window
    if not spec.family.gguf.expert_width:
        keys.pop("expert_feed_forward_length", None)
    keys |= spec.family.gguf.keys(spec.read)
    if drafts:
        each = {key: keys[key] for key in _BY_LAYER if isinstance(keys.get(key), tuple)}
        keys |= {key: (*value, *value[-1:] * drafts) for key, value in each.items()}
        keys |= {"block_count": spec.layers + drafts, "nextn_predict_layers": drafts}
    first = {key: keys[key] for key in _ORDER if key in keys}
    return {key: value for key, value in (first | keys).items() if value is not None}


@dataclass(frozen=True)
class Metadata:
    """A file's metadata, for families to make a config.json of. names: of its tensors; rows: of the vocabulary; factors: its
    tensors of divisors of rotary frequencies."""

    path: str
    arch: str
    fields: Mapping[str, Any]
    names: frozenset[str] = frozenset()
    rows: int = 0
    factors: Mapping[str, list[float]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Keys of the architecture that somebody asked for."""

    def get(self, key: str) -> Any:
        """What a key of the architecture says, None where it is not there: one value for all layers, floats as short as
        float32 has them."""
        self.used.add(key)
        value = self.fields.get(f"{self.arch}.{key}")
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        return _shortest(value) if isinstance(value, float) else value

    def number(self, key: str, default: int | None = None) -> int:
        """A key that must be a whole number. Raises CheckpointError."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {self.arch}.{key} is {in_words(value)}, not one whole number; fetch it again"
            )
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A key that must be a number above 0. Raises CheckpointError."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{self.path}: {self.arch}.{key} is {in_words(value)}, not a number above 0; fetch it again"
            )
        return value

    @property
    def turning_share(self) -> float:
        """The part of a head that rotary positions turn. Raises CheckpointError."""
        return self.number("rope.dimension_count") / max(self.number("attention.key_length"), 1)

    def has(self, name: str) -> bool:
        """Whether a block has a tensor of this name, or the model."""
        return name in self.names or name in self._inside

    @cached_property
    def _inside(self) -> frozenset[str]:
        return frozenset(re.sub(r"^blk\.\d+\.", "", name) for name in self.names)

    @property
    def drafts(self) -> int:
        """Blocks behind the model's own that draft further tokens."""
        return self.number("nextn_predict_layers", 0)

    @property
    def layers(self) -> range:
        """Blocks of the model, without those that draft further tokens. Raises CheckpointError for more than there can be."""
        count = self.number("block_count") - self.drafts
        if not 0 < count <= LAYERS:
            raise CheckpointError(f"{self.path}: {count} blocks in its metadata; fetch it again")
        return range(count)


def _shortest(value: float) -> float:
    """The decimal number of fewest digits that is this float32: what was written down before it was rounded."""
    try:
        for digits in range(6, 10):
            short = float(f"{value:.{digits}g}")
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    except OverflowError:  # a float64 that is none
        pass
    return value


def same(stored: Any, ours: Any) -> bool:
    """Whether a file says what a model's declarations do, as far as float32 can hold it."""
    if isinstance(ours, tuple | list) and isinstance(stored, list):
        return len(stored) == len(ours) and all(map(same, stored, ours))
    if isinstance(stored, list):
        return bool(stored) and all(same(one, ours) for one in stored)
    if isinstance(ours, float) or isinstance(stored, float):
        return isinstance(stored, int | float) and abs(stored - ours) <= 1e-6 * max(abs(stored), abs(ours))
    return bool(stored == ours)
