"""Where labels go beside their points: a deterministic search for places that cover as little as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DISTANCES = (6.0, 14.0, 26.0, 40.0)  # from the point, in points of type
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
SWEEPS = 4
OUTSIDE, COVERED, CROSSED, FAR = 50.0, 10.0, 20.0, 0.02
"""What a square pixel costs outside, over something, or where a line and a text meet; and a pixel of distance."""


@dataclass(frozen=True)
class Box:
    x0: float
    y0: float
    x1: float
    y1: float

    def common(self, other: Box) -> float:
        """Area of both."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


@dataclass(frozen=True)
class Spot:
    """An offset from the point in pixels, how the text is aligned there, and whether it needs a line to its point."""

    dx: float
    dy: float
    horizontal: str
    vertical: str
    far: bool
    box: Box

    def line(self) -> list[Box]:
        """The line to the point, as a row of small boxes; none for a spot that needs no line."""
        if not self.far:
            return []
        x = {"left": self.box.x0, "center": (self.box.x0 + self.box.x1) / 2, "right": self.box.x1}[self.horizontal]
        y = {"bottom": self.box.y0, "center": (self.box.y0 + self.box.y1) / 2, "top": self.box.y1}[self.vertical]
        steps = [part / 8 for part in range(1, 8)]
        return [Box(x - self.dx * t - 1, y - self.dy * t - 1, x - self.dx * t + 1, y - self.dy * t + 1) for t in steps]


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    inside: Box,
    scale: float = 1.0,
) -> list[Spot]:
    """One spot a label. points, sizes (width, height), taken, inside: pixels; scale: pixels per point of type.

    Each label in turn takes the spot that costs least given all others, until none moves.
    """
    options = [_options(point, size, scale) for point, size in zip(points, sizes, strict=True)]
    chosen = [spots[0] for spots in options]
    for _ in range(SWEEPS):
        before = list(chosen)
        for number, spots in enumerate(options):
            others = [spot for at, spot in enumerate(chosen) if at != number]
            costs = [_cost(spot, order, others, taken, inside) for order, spot in enumerate(spots)]
            chosen[number] = spots[costs.index(min(costs))]
        if chosen == before:
            break
    return chosen


def _options(point: tuple[float, float], size: tuple[float, float], scale: float) -> list[Spot]:
    (x, y), (width, height) = point, size
    found = []
    for number, distance in enumerate(DISTANCES):
        for right, up in DIRECTIONS:
            reach = distance * scale * (0.72 if right and up else 1.0)
            dx, dy = right * reach, up * reach
            left = x + dx - (width if right < 0 else width / 2 if right == 0 else 0)
            low = y + dy - (height if up < 0 else height / 2 if up == 0 else 0)
            horizontal = ("right", "center", "left")[right + 1]
            vertical = ("top", "center", "bottom")[up + 1]
            box = Box(left, low, left + width, low + height)
            found.append(Spot(dx, dy, horizontal, vertical, number > 0, box))
    return found


def _cost(spot: Spot, order: int, others: Sequence[Spot], taken: Sequence[Box], inside: Box) -> float:
    outside = spot.box.area - spot.box.common(inside)
    lines = [box for other in others for box in other.line()]
    covered = sum(spot.box.common(box) for box in (*taken, *(other.box for other in others)))
    crossed = sum(spot.box.common(box) for box in lines)
    crossed += sum(box.common(other.box) for box in spot.line() for other in others)
    return (
        OUTSIDE * outside + COVERED * covered + CROSSED * crossed + FAR * (abs(spot.dx) + abs(spot.dy)) + 0.01 * order
    )
