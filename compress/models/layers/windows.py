"""Sliding windows of some layers alone: their configuration, and how GGUF's metadata says it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import CheckpointError
from compress.limits import LAYERS
from compress.models.config import Positive, RopeKeys, Windows
from compress.models.layers.rope import Rope, scaling_of

if TYPE_CHECKING:
    from compress.models.gguf.keys import Metadata

_PATTERN = "attention.sliding_window_pattern"


class Interleaved(Windows):
    """All layers slide but every n-th; with LAYER_ROPES either kind has rotary positions of its own, of which full layers' alone may
    be scaled.

    PERIOD: the n where config.json does not say it; LOCAL_THETA: the base of sliding layers, likewise.
    """

    PERIOD: ClassVar[int]
    LOCAL_THETA: ClassVar[float]
    LAYER_ROPES: ClassVar[bool] = True
    GGUF: ClassVar[Mapping[str, str]] = {"sliding_window": "attention.sliding_window"}

    sliding_window_pattern: Annotated[int, Field(ge=1, le=LAYERS)] | None = None
    rope_local_base_freq: Positive | None = None

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        table = self._given.get("rope_parameters")
        if self.LAYER_ROPES and table and not any(isinstance(table.get(kind), dict) for kind in RopeKeys.KINDS):
            yield f"rope_parameters: needs those of {' and of '.join(RopeKeys.KINDS)}, each under its name"

    def slides(self, layer: int) -> bool:
        """Whether a layer attends through a sliding window."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        return (layer + 1) % (self.sliding_window_pattern or self.PERIOD) != 0

    def window(self, layer: int, rule: Literal["all", "late", "even"] = "all") -> int | None:
        return self.widest() if self.slides(layer) else None

    def rope_of(self, layer: int) -> Rope:
        """A layer's positions."""
        return self.rope(kind="sliding_attention" if self.slides(layer) else "full_attention")

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        if not self.LAYER_ROPES:
            return super()._rope()
        kind = kind or "full_attention"
        table = (self._given.get("rope_parameters") or {}).get(kind) or {}
        if kind == "sliding_attention":
            return {"rope_theta": self.rope_local_base_freq or self.LOCAL_THETA, **table}
        return {"rope_theta": self.rope_theta, **table, **(self._given.get("rope_scaling") or {})}

    def _rope_kind(self, kind: str) -> str:
        return kind if self.LAYER_ROPES else ""


def window_keys(c: Interleaved, period: int) -> dict[str, Any]:
    """Metadata: the positions of either kind of layer, and which slide where those are not all but every `period`-th, as
    llama.cpp's architecture has it."""
    keys = {**c.rope(kind="full_attention").gguf_keys(), "rope.freq_base_swa": c.rope(kind="sliding_attention").theta}
    slides = tuple(c.slides(layer) for layer in range(c.layers))
    return keys if slides == _usual(period, c.layers) else {**keys, _PATTERN: slides}


def window_problems(c: Interleaved, arch: str, scalings: tuple[str, ...], same_base: bool = False) -> Iterator[str]:
    """Why llama.cpp's `arch` cannot say them. scalings: of full layers' positions that it keeps from the sliding ones';
    same_base: it has one base for both."""
    full, sliding = (c.rope(kind=kind) for kind in ("full_attention", "sliding_attention"))
    if sliding.type != "default":
        yield f"llama.cpp's {arch} scales no positions of sliding layers; this model does ({sliding.type})"
    if full.type not in ("default", *scalings):
        yield f"llama.cpp's {arch} scales positions of full layers alone by {', '.join(scalings)}, not by {full.type}"
    if same_base and full.theta != sliding.theta:
        yield f"llama.cpp's {arch} has one rope_theta for all layers; this model has {full.theta:g} and {sliding.theta:g}"


def read_windows(metadata: Metadata, period: int, local: float) -> dict[str, Any]:
    """Keys of config.json for what a file says of either kind of layer: `window_keys` backwards. local: the rope_theta of
    sliding layers where it is not said."""
    layers = len(metadata.layers)
    metadata.used.add(_PATTERN)
    slides = metadata.fields.get(f"{metadata.arch}.{_PATTERN}", period)
    if isinstance(slides, int):
        slides = _usual(slides, layers)
    if not isinstance(slides, list | tuple) or len(slides) != layers:
        raise CheckpointError(
            f"{metadata.path}: {metadata.arch}.{_PATTERN} does not say it of {layers} layers; fetch it again"
        )
    base = metadata.positive("rope.freq_base", 10000.0)
    full: Mapping[str, Any] = scaling_of(metadata, metadata.factors).get("rope_scaling", {"rope_type": "default"})
    return {
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_scaling": None,
        "rope_theta": None,
        "rope_parameters": {
            "full_attention": {**full, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": metadata.positive("rope.freq_base_swa", local)},
        },
    }


def _usual(period: int, layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % period != 0 for layer in range(layers)) if period > 0 else (False,) * layers
