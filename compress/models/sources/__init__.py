"""Checkpoints that are quantized already, read as the floats that they decode to: one file a format."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from compress.models.index import Entry, named_codec
from compress.models.sources.base import Coded, Format, Stored
from compress.reading import in_words, read_json

_PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))
"""Where config.json says how a checkpoint is quantized."""
_ACTIVATIONS = re.compile(
    r".*[._](?:(?:input|output|activation|q|k|v|prob)(?:_global)?_(?:scale|zero_point)(?:_inv)?|input_amax|output_amax)"
)
"""What engines round activations and caches with."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint is once its tensors are decoded.

    config: without what it says of the quantization, which is `settings`; unread: why its tensors are not decoded, after the
    name of the model, "" where they are.
    """

    config: Mapping[str, Any]
    entries: Stored
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    unread: str = ""


@cache
def formats() -> tuple[Format, ...]:
    """All that are read."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return tuple(module.FORMAT for module in modules if hasattr(module, "FORMAT"))


def source_of(folder: Path, config: Mapping[str, Any], stored: Stored) -> Source:
    """A checkpoint by its config.json and the tensors of its files, which may be none. folder: where they lie.

    Raises CheckpointError where the parts of a quantized tensor contradict each other, ConfigError for settings that are none.
    """
    bare, settings = _without_settings(config)
    settings = settings or _beside(folder)
    if settings is None:
        return Source(bare, stored, {})
    method = in_words(settings.get("quant_method", "by a method without a name")).strip("'")
    form = next((found for found in formats() if method in found.methods and found.claims(settings)), None)
    if form is None:
        known = ", ".join(sorted({method for found in formats() for method in found.methods}))
        return Source(
            bare, stored, settings, unread=f"is already quantized ({method}), which is not read; read are {known}"
        )
    if why := form.problem(settings):
        return Source(bare, stored, settings, unread=f"is already quantized ({form.name}) {why}")
    if not stored:
        return Source(bare, stored, settings, (already_quantized(f"{form.name}, as config.json says"),))
    own = named_codec(config) or named_codec(_text(config)) or "bf16"
    found = {name: replace(entry, own=own) for name, entry in form.find(settings, stored)}
    used = {part for entry in found.values() for part, _ in entry.parts.values()}
    rest = {name: entry for name, entry in stored.items() if name not in used}
    dropped = [name for name in rest if _ACTIVATIONS.fullmatch(name)]
    entries: dict[str, Entry] = {**{name: entry for name, entry in rest.items() if name not in dropped}, **found}
    notes = [already_quantized(shares(counted(entries), len(found)))] if found else []
    if dropped:
        notes.append(f"left out, as weights do without: scales of activations and caches ({len(dropped)} tensors)")
    return Source(bare, entries, settings, tuple(notes))


def _beside(folder: Path) -> Mapping[str, Any] | None:
    """What a file beside config.json says in its place."""
    for form in formats():
        if form.beside and (folder / form.beside).is_file():
            return {"quant_method": form.methods[0], **read_json(folder / form.beside)}
    return None


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says so."""
    return _without_settings(config)[1] is not None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _without_settings(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """config.json without what it says of a quantization, and that; None where it says nothing."""
    found = None
    for *above, key in _PLACES:
        inner = _text(config) if above else config
        if isinstance(inner.get(key), dict):
            found = inner[key] if found is None else found
            inner = {name: value for name, value in inner.items() if name != key}
            config = {**config, "text_config": inner} if above else inner
    return config, found


def counted(entries: Mapping[str, Entry]) -> Counter[str]:
    """Weights of every type."""
    found: Counter[str] = Counter()
    for entry in entries.values():
        found[entry.dtype] += prod(entry.shape)
    return found


def shares(weights: Counter[str], quantized: int) -> str:
    """Types with their shares of all weights, the largest first, and how many tensors are quantized."""
    total = max(1, weights.total())
    told = [f"{kind} {count / total:.1%}" for kind, count in weights.most_common() if count >= 0.0005 * total]
    return f"{', '.join(told)} of the weights; {quantized} tensors"


def already_quantized(what: str) -> str:
    """The line for a source that was quantized before."""
    return (
        f"the source is already quantized ({what}): what comes out can be no closer to the model before it was quantized than "
        "these decoded weights are"
    )


__all__ = [
    "Coded",
    "Format",
    "Source",
    "already_quantized",
    "counted",
    "formats",
    "is_quantized",
    "shares",
    "source_of",
]
