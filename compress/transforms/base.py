"""Per-channel scales folded into a block: what AWQ and SmoothQuant share.

Linears that read the same input x may read x / s instead, with W diag(s) in place of W, if whatever produces x is
divided by s. The producers here are linear in each channel, so that the block computes what it did, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.statistics import Moments

if TYPE_CHECKING:
    from compress.models.layers.base import Input
    from compress.models.spec import Branch

Quantize = Callable[[str, Tensor, Tensor], Tensor]
"""(name, weight [R, n], importance of its columns [n]) -> the weight as its codec would round it, or itself."""

SAMPLE = 1 << 16
"""Weights of a fold on which scales are judged, and the fewest rows of each linear: rows are rounded independently of
each other, and what one scale does to their error is alike."""
FEWEST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Fold:
    """Linears that share an input, and the tensors that produce it.

    input: key of the activations in `TensorSpec.input`; channels: their width n; consumers: [m, n] weights that are
    quantized; routers: [m, n] weights that read the same input and stay float; producers: norms, weights and biases
    with one channel per row. Where several inputs share a producer's row (query heads that attend to one value head),
    channels are ordered [kv heads, `heads` per kv head, `head_dim`] and rows [kv heads, head_dim]. place: the recipe's word
    for the input; shifts: what the model adds to the stored numbers of producers, by name.
    """

    input: str
    channels: int
    consumers: tuple[str, ...]
    routers: tuple[str, ...]
    producers: tuple[str, ...]
    heads: int = 1
    head_dim: int = 1
    place: str = ""
    shifts: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that the fold changes."""
        return self.consumers + self.routers + self.producers

    @property
    def rows(self) -> int:
        """Scales that can be chosen: the producers' rows."""
        return self.channels // self.heads

    def spread(self, scale: Tensor) -> Tensor:
        """[rows] -> [channels]: each row's scale at every channel that it feeds."""
        return scale.reshape(-1, 1, self.head_dim).expand(-1, self.heads, -1).reshape(self.channels)

    def gather(self, values: Tensor) -> Tensor:
        """[channels] -> [rows, heads]: the values of the channels that each row feeds."""
        return values.reshape(-1, self.heads, self.head_dim).transpose(1, 2).reshape(self.rows, self.heads)


def folds(branch: Branch) -> tuple[Fold, ...]:
    """The folds of one sub-layer, in execution order: every input that something in front of it produces, by its declaration.

    Inputs that are rows of another (those of routed experts, of a shared one) are scaled with it, and its activations are
    those of all tokens.
    """
    return tuple(_fold(branch, wanted) for wanted in branch.inputs.values() if wanted.made_by)


def _fold(branch: Branch, wanted: Input) -> Fold:
    keys = {wanted.key} | {other.key for other in branch.inputs.values() if other.part_of == wanted.key}
    readers = [t for t in branch.tensors if t.input in keys]
    shifts = {branch.root + w.name: w.shift for w in branch.sublayer.weights if w.shift}
    return Fold(
        wanted.key,
        wanted.width,
        tuple(t.name for t in readers if t.role != "router"),
        tuple(t.name for t in readers if t.role == "router"),
        tuple(branch.root + name for name in wanted.made_by),
        wanted.heads,
        wanted.head_dim,
        wanted.place,
        shifts,
    )


def apply(weights: Mapping[str, Tensor], fold: Fold, scale: Tensor) -> dict[str, Tensor]:
    """The tensors that change when `fold` gets `scale`: W diag(s) for what reads the input, rows / s for what makes it.

    scale: [fold.rows], positive. Computed in float64; float32 comes back, float64 where it came in. Raises ValueError
    for a scale of another length or one that is not positive and finite.
    """
    if scale.shape != (fold.rows,) or not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ValueError(f"{fold.input}: need {fold.rows} positive finite scales, got {tuple(scale.shape)}")
    rows = scale.double()
    columns = fold.spread(rows)
    readers, makers = fold.consumers + fold.routers, fold.producers
    wide = {name: weights[name].double() for name in fold.names}
    out = {name: wide[name] * columns for name in readers}
    for name in makers:
        shift, divisor = fold.shifts.get(name, 0.0), rows.reshape(-1, *[1] * (wide[name].dim() - 1))
        out[name] = (wide[name] + shift) / divisor - shift if shift else wide[name] / divisor
    return {name: w if weights[name].dtype == torch.float64 else w.float() for name, w in out.items()}


def rounding_error(
    fold: Fold,
    weights: Mapping[str, Tensor],
    scale: Tensor,
    seen: Moments,
    quantize: Quantize,
    own: Mapping[str, Moments] | None = None,
    sample: int = SAMPLE,
) -> float:
    """How badly the consumers are rounded with this scale: sum tr(D G D^T) / sum tr(W G W^T) over consumers.

    D = quantize(W diag(s)) diag(1/s) - W, and quantize is told the importance diag(G) / s^2. scale: [fold.rows];
    seen: moments of the fold's input; own: those of consumers, by name, that see only part of it (routed experts), as
    sums over the same tokens. Some rows of each consumer, evenly spaced, stand for all: `sample` weights altogether, but
    no fewer than 16 rows of each.
    """
    rows = max(FEWEST_ROWS, sample // (fold.channels * len(fold.consumers)))
    columns = fold.spread(scale.float())
    lost = total = 0.0
    for name in fold.consumers:
        weight = _some_rows(weights[name], rows).float()
        gram = (own or {}).get(name, seen).gram
        rounded = quantize(name, weight * columns, gram.diagonal() / columns**2) / columns
        share = len(weights[name]) / len(weight)
        lost += share * _energy(rounded - weight, gram)
        total += share * _energy(weight, gram)
    return lost / max(total, 1e-30)


def _energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W G W^T)."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))


def _some_rows(weight: Tensor, count: int) -> Tensor:
    if len(weight) <= count:
        return weight
    return weight[torch.arange(count, device=weight.device) * len(weight) // count]
