"""Rotary position embeddings (RoPE, arXiv 2104.09864) and their scalings, as a config gives them. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModel
from compress.reading import in_words

if TYPE_CHECKING:
    import numpy as np

    from compress.models.gguf.keys import Metadata

TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of GGUF that hold divisors of rotary frequencies, which its metadata has no key for."""

STILL = 1e30
"""The divisor of channels that do not turn (llama.cpp's converter of Gemma 4)."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model.

    dim: channels of a head that turn, the first; theta: base; max_positions: of the model; scaling: the config's rope
    parameters as JSON, "" for none; config: config.json as JSON, from which transformers computes scaled frequencies;
    layer_type: the kind of layer whose parameters they are, where config.json has some for each.
    """

    dim: int
    theta: float
    max_positions: int
    scaling: str = ""
    config: str = ""
    layer_type: str = ""

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """The scaling's own."""
        return json.loads(self.scaling) if self.scaling else {}

    @property
    def type(self) -> str:
        return str(self.parameters.get("rope_type") or self.parameters.get("type") or "default")

    def gguf_keys(self) -> Mapping[str, Any]:
        """Metadata, scaling included."""
        keys: dict[str, Any] = {"rope.dimension_count": self.dim, "rope.freq_base": self.theta}
        scaling = self.parameters
        if self.type in ("linear", "yarn"):
            keys |= {"rope.scaling.type": self.type, "rope.scaling.factor": float(scaling["factor"])}
        if self.type == "yarn":
            original = int(scaling.get("original_max_position_embeddings") or self.max_positions)
            keys |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": self.yarn_attention}
        if self.type == "longrope":
            keys |= {
                "rope.scaling.original_context_length": self.original,
                "rope.scaling.attn_factor": self.long_attention,
            }
        return keys

    @property
    def original(self) -> int:
        """Positions of the model before it was scaled."""
        return int(self.parameters.get("original_max_position_embeddings") or self.max_positions)

    @property
    def long_attention(self) -> float:
        """LongRoPE's factor on cos and sin (arXiv 2402.13753), as transformers computes it."""
        scaling = self.parameters
        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"])
        factor = float(scaling.get("factor") or self.max_positions / self.original)
        return math.sqrt(1 + math.log(factor) / math.log(self.original)) if factor > 1 else 1.0

    def problems(self, arch: str, llama3: bool, longrope: bool = False) -> list[str]:
        """Why llama.cpp's architecture `arch` cannot say this scaling; llama3, longrope: it reads the factors of these."""
        if self.type in ("default", "linear", "dynamic", "proportional") or (self.type == "longrope" and longrope):
            return []
        if self.type == "llama3":
            return [] if llama3 else [f"llama.cpp's {arch} has no llama3 rope scaling"]
        if self.type != "yarn":
            return [f"rope scaling {self.type!r} cannot be expressed in GGUF for {arch}"]
        if (self.parameters.get("beta_fast") or 32, self.parameters.get("beta_slow") or 1) != (32, 1):
            # keys exist, these architectures ignore them
            return [f"llama.cpp's yarn for {arch} has no beta_fast and beta_slow other than 32 and 1"]
        return []

    @property
    def yarn_attention(self) -> float:
        """llama.cpp's attn_factor, which multiplies yarn's own 1 + 0.1 ln(factor); transformers takes it as the whole."""
        scaling = self.parameters
        own = 1.0 + 0.1 * math.log(float(scaling["factor"]))

        def mscale(value: float) -> float:  # transformers' get_mscale
            return 1.0 + (own - 1.0) * value

        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"]) / own
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return mscale(float(scaling["mscale"])) / mscale(float(scaling["mscale_all_dim"])) / own
        return 1.0

    def factors(self) -> dict[str, np.ndarray]:
        """Divisors of frequencies by the names of GGUF's tensors, float32 [dim / 2]; none for most scalings."""
        import numpy as np

        if (found := self.llama3_factors()) is not None:
            return {FREQUENCIES: found}
        if self.type == "proportional":
            turning = int(float(self.parameters.get("partial_rotary_factor") or 1.0) * self.dim // 2)
            return {FREQUENCIES: np.array([1.0] * turning + [STILL] * (self.dim // 2 - turning), np.float32)}
        if self.type != "longrope":
            return {}
        names = {LONG: "long_factor", SHORT: "short_factor"}
        return {name: np.array(self.parameters[key], np.float32) for name, key in names.items()}

    def llama3_factors(self) -> np.ndarray | None:
        """Llama 3's frequency divisors, float32 [dim / 2], GGUF's rope_freqs.weight; None for other scalings."""
        import numpy as np

        if self.type != "llama3":
            return None
        scaling = self.parameters
        factor = float(scaling.get("factor", 8.0))
        low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
        original = float(scaling.get("original_max_position_embeddings", 8192))
        wavelength = 2 * math.pi * self.theta ** (np.arange(0, self.dim, 2) / self.dim)
        smooth = (original / wavelength - low) / (high - low)
        middle = 1.0 / ((1.0 - smooth) / factor + smooth)
        out = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, middle))
        return out.astype(np.float32)


# -- from GGUF, the other way round ------------------------------------------------------------------------------------
def scaling_of(metadata: Metadata, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Keys of config.json for what a file says of scaled positions; factors: its tensors of divisors.

    Raises UnsupportedModel for another scaling than `gguf_keys` and `factors` write.
    """
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    kind = kind or ("linear" if factor else "none")
    if any(value != 1 for divisors in factors.values() for value in divisors):
        if kind != "none":
            raise UnsupportedModel(f"{metadata.path} scales rotary positions twice: {kind}, and by {min(factors)}")
        if max(factors.get(FREQUENCIES, (0,))) >= STILL / 10:
            turning, pairs = factors[FREQUENCIES].count(1.0), len(factors[FREQUENCIES])
            return {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": turning / pairs}}
        if FREQUENCIES in factors:
            return {"rope_scaling": _llama3(metadata, factors[FREQUENCIES])}
        return {"rope_scaling": _longrope(metadata, factors)}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"{metadata.path}: rope scaling {in_words(kind)} is not read from GGUF")
    factor = metadata.positive("rope.scaling.factor")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        if original := metadata.get("rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = original
        if (attention := metadata.positive("rope.scaling.attn_factor", 1.0)) != 1:
            scaling["attention_factor"] = float(f"{attention * (1.0 + 0.1 * math.log(factor)):.7g}")
    return {"rope_scaling": scaling}


def _longrope(metadata: Metadata, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    if missing := {LONG, SHORT} - factors.keys():
        raise UnsupportedModel(f"{metadata.path} scales long or short texts alone: it lacks {min(missing)}")
    short = {name: [float(f"{value:.7g}") for value in values] for name, values in factors.items()}
    return {
        "rope_type": "longrope",
        "long_factor": short[LONG],
        "short_factor": short[SHORT],
        "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
        "attention_factor": float(metadata.positive("rope.scaling.attn_factor", 1.0)),
    }


def _llama3(metadata: Metadata, factors: Sequence[float]) -> dict[str, Any]:
    """Llama 3's parameters of given divisors: common ones where they fit, else those of the straight line between the
    frequencies that stay and those that are divided, whose unit is free."""
    theta, factor, dim = metadata.positive("rope.freq_base", 10000.0), max(factors), 2 * len(factors)
    waves = [2 * math.pi * theta ** (2 * i / dim) for i in range(len(factors))]
    smooth = [(1 / f - 1 / factor) / (1 - 1 / factor) for f in factors]
    middle = [(1 / w, s) for w, s in zip(waves, smooth, strict=True) if 1e-6 < s < 1 - 1e-6]
    tried: list[tuple[float, float, float]] = [(1.0, 4.0, 8192.0)]
    if middle:
        x, s = middle[0]
        tried.append((1.0, 4.0, (3 * s + 1) / x))
    else:  # none lies between those that stay and those that are divided: any start and end between them will do
        stay = max((w for w, s in zip(waves, smooth, strict=True) if s > 0.5), default=waves[0] / 4)
        go = min((w for w, s in zip(waves, smooth, strict=True) if s < 0.5), default=waves[-1] * 4)
        tried.append((1.0, math.sqrt(math.sqrt(go / stay)), math.sqrt(stay * go)))
    if len(middle) > 1 and middle[0][1] != middle[-1][1]:
        (x1, s1), (x2, s2) = middle[0], middle[-1]
        slope = (s1 - s2) / (x1 - x2)
        if (start := slope * x1 - s1) > 0:
            tried.append((1.0, float(f"{1 + 1 / start:.4g}"), slope / start))
    for low, high, original in tried:
        scaling = {"rope_type": "llama3", "factor": float(f"{factor:.6g}"), "low_freq_factor": low,
                   "high_freq_factor": high, "original_max_position_embeddings": max(round(original), 1)}  # fmt: skip
        ours = Rope(dim, theta, 0, json.dumps(scaling)).llama3_factors()
        assert ours is not None
        if len(ours) == len(factors) and all(abs(a - b) <= 1e-4 * b for a, b in zip(ours, factors, strict=True)):
            return scaling
    raise UnsupportedModel(
        f"{metadata.path}: the divisors of rotary frequencies in rope_freqs.weight are not those of a llama3 rope scaling"
    )
