"""Numbers as people read them: sizes, times, estimates with their 95% intervals in square brackets. A dash: not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

DASH = "–"


class Estimated(Protocol):
    """A value with the ends of its interval, None where there is none."""

    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


@dataclass(frozen=True)
class Cell:
    """What a table shows of one number: the estimate, and what qualifies it."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


NOTHING = Cell(DASH)


def human_bytes(count: int | float | None) -> str:
    """1536 -> "1.5 KiB"; three significant digits, binary units."""
    if count is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{significant(count)} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float | None, digits: int = 3) -> str:
    """0.02581 -> "0.0258", 1234.5 -> "1234"."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "∞"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # 0.9999 has the decimals of 1.00
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 8)}f}"


def percent(share: float | None) -> str:
    """0.2123 -> "21.2%"."""
    return DASH if share is None else f"{100 * share:.1f}%"


def bits(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def estimate(value: float | None, low: float | None, high: float | None, scale: float = 1.0, unit: str = "") -> Cell:
    """Like 12.34 and [11.90, 12.81]: enough decimals to show the interval's second digit."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return Cell("∞")
    value *= scale
    if low is None or high is None or not math.isfinite(high):
        return Cell(f"{significant(value, 4)}{unit}")
    low, high = low * scale, high * scale
    if 0 < abs(value) < 1e-4:
        return Cell(f"{value:.2e}{unit}", f"[{low:.2e}, {high:.2e}]")
    width = high - low
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6) if width > 0 else (1 if unit == "%" else 4)
    return Cell(f"{value:.{decimals}f}{unit}", f"[{low:.{decimals}f}, {high:.{decimals}f}]")


def interval(found: Estimated | None, scale: float = 1.0, unit: str = "") -> Cell:
    """The same of an estimate that may be missing."""
    return NOTHING if found is None else estimate(found.value, found.low, found.high, scale, unit)


_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(%?)(?!\w)")


def pattern(text: str) -> str:
    """A text without its numbers: what texts have in common that differ in these alone."""
    return _NUMBER.sub(r"#\1", text)


def spanned(texts: Sequence[str]) -> str:
    """Texts of one pattern as one, in which the least and the greatest stand for all numbers: "83% to 100% of the pool". The
    first one where patterns differ."""
    if len({pattern(text) for text in texts}) > 1:
        return texts[0]
    columns = iter(zip(*(_NUMBER.finditer(text) for text in texts), strict=True))

    def span(_: re.Match[str]) -> str:
        found = sorted(
            (match[0] for match in next(columns)), key=lambda number: float(number.strip("%").replace(",", ""))
        )
        return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"

    return _NUMBER.sub(span, texts[0])
