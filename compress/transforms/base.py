"""Per-channel scales folded into a block: what AWQ and SmoothQuant share.

Linears that read the same input x may read x / s instead, with W diag(s) in place of W, if whatever produces x is
divided by s. The producers here are linear in each channel, so that the block computes what it did, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.statistics import Moments

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec

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
    channels are ordered [kv heads, `heads` per kv head, `head_dim`] and rows [kv heads, head_dim].
    """

    input: str
    channels: int
    consumers: tuple[str, ...]
    routers: tuple[str, ...]
    producers: tuple[str, ...]
    heads: int = 1
    head_dim: int = 1

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


def folds(spec: ModelSpec, layer: int, weights: Container[str]) -> tuple[Fold, ...]:
    """The folds of one block, in execution order, as far as all their tensors are in `weights` (half a block, say).

    attention.in and mlp.in fold into the norm before; with experts one scale serves the router, the shared expert's
    gate and every expert, and its key is "router", whose activations are those of all tokens. attention.out folds into
    v_proj, the input of each down_proj into its up_proj.
    """
    block = {t.name: t for t in spec.block_tensors(layer)}
    root = f"model.layers.{layer}."

    def reading(half: str, end: str) -> tuple[str, ...]:
        return tuple(t.name for t in block.values() if t.half == half and t.input and t.input.endswith(end))

    def made_by(weight: str) -> tuple[str, ...]:
        return tuple(name for name in (weight, weight.removesuffix("weight") + "bias") if name in block)

    sparse, h = spec.is_sparse(layer), spec.hidden_size
    found = [
        Fold("attention.in", h, reading("attention", ".in"), (), (f"{root}input_layernorm.weight",)),
        Fold(
            "attention.out",
            spec.heads * spec.head_dim,
            reading("attention", ".out"),
            (),
            made_by(f"{root}self_attn.v_proj.weight"),
            spec.heads // spec.kv_heads,
            spec.head_dim,
        ),
        Fold(
            "router" if sparse else "mlp.in",
            h,
            reading("ffn", ".in"),
            reading("ffn", "router"),
            (f"{root}post_attention_layernorm.weight",),
        ),
    ]
    ups = {t.input: t.name for t in block.values() if t.role.endswith(".up")}
    for name in reading("ffn", ".act"):
        key, channels = block[name].input, block[name].shape[1]
        found.append(Fold(key, channels, (name,), (), made_by(ups[key.removesuffix("act") + "in"])))
    return tuple(fold for fold in found if all(name in weights for name in fold.names))


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
    out |= {name: wide[name] / rows.reshape(-1, *[1] * (wide[name].dim() - 1)) for name in makers}
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
