"""One pass of the original model over the calibration windows that tells what its layers, experts, heads and channels
are worth; one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.limits import BATCH_TOKENS
from compress.models.forward import forward_attention, forward_ffn
from compress.models.spec import ModelSpec
from compress.streaming.journal import Activations
from compress.streaming.walk import embed
from compress.structured.scores import Fluctuation, block_influence, cosines, reap_terms

Loader = Callable[[str], Tensor]
Scratch = Callable[[str], Activations]


@dataclass(frozen=True, eq=False)
class LayerScores:
    """What the parts of one layer are worth.

    influence: mean of 1 - cos over tokens; heads: float64 [kv_heads], FLAP's metric summed over a group's columns of
    o_proj; channels: the metric of every feed-forward, by its name ("mlp", "shared", "experts.{e}"), for routed experts
    times the mean over all tokens of the squared gate, so that all are squared errors a token; saliency: float64
    [experts], REAP's, 0 for an expert that no token reached; frequency: float64 [experts], share of the choices;
    likeness: [experts, experts], cosine of two experts' router logits over tokens. Empty where there is nothing to tell.
    """

    influence: float
    heads: Tensor
    channels: Mapping[str, Tensor]
    saliency: Tensor
    frequency: Tensor
    likeness: Tensor


class Watch(Protocol):
    """Looks on while one block runs."""

    def see(self, key: str, x: Tensor, gate: Tensor | None) -> None:
        """An Observer of models.decoder."""

    def passed(self, before: Tensor, after: Tensor) -> None:
        """Residual stream at the input and the output of the block, after each batch of windows."""


W = TypeVar("W", bound=Watch)


def survey(
    spec: ModelSpec,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[LayerScores]:
    """Scores of every layer.

    load(name) gives a tensor of `spec`; ids: [windows, length]; scratch(name): activation files of the ids' shape,
    deleted when done. Raises NumericalError naming the block whose output is not finite.
    """
    scores = []
    for layer, watch in enumerate(_walk(spec, load, ids, scratch, partial(_Scorer, spec))):
        scores.append(watch.scores())
        progress((layer + 1) / spec.layers)
    return scores


def outlier_ratios(
    spec: ModelSpec, load: Loader, ids: np.ndarray, scratch: Scratch, threshold: float = 5.0
) -> list[float]:
    """Share of each layer's weights that are outliers: |W_ij| |x_j| above `threshold` times the layer's mean (OWL, arXiv
    2310.05175).

    |x_j| is the root mean square of the input over all tokens, for routed experts times the routing weight, 0 where
    a token goes elsewhere. Counted over all matrices of a block but routers. Arguments as of `survey`.
    """
    return [watch.share(threshold) for watch in _walk(spec, load, ids, scratch, partial(_Outliers, spec))]


def _walk(
    spec: ModelSpec,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    begin: Callable[[int, Mapping[str, Tensor]], W],
) -> Iterator[W]:
    """Run the model over all windows; yields what `begin(layer, weights)` made, once it has seen all of them."""
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    source = scratch(f"survey-{0:05d}")
    embed(load("model.embed_tokens.weight"), ids, source, batch)
    for layer in range(spec.layers):
        weights = {t.name: load(t.name).float() for t in spec.block_tensors(layer)}
        watch, target = begin(layer, weights), scratch(f"survey-{layer + 1:05d}")
        with torch.no_grad(), target.writing() as out:
            for start in range(0, len(ids), batch):
                hidden = source.read(start, min(start + batch, len(ids)))
                middle = forward_attention(spec, layer, weights, hidden, observe=watch.see)
                after = forward_ffn(spec, layer, weights, middle, observe=watch.see)
                if not torch.isfinite(after).all():
                    raise NumericalError(
                        f"the output of block {layer} is not finite for calibration samples from {start} on; "
                        "the checkpoint overflows there, drop the sample or check the weights"
                    )
                watch.passed(hidden, after)
                out.append(after)
        source.delete()
        source = target
        yield watch
    source.delete()


class _Scorer:
    """Collects the scores of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Mapping[str, Tensor]):
        self.spec = spec
        self.readers = {t.input: weights[t.name] for t in spec.block_tensors(layer) if _reads_inner(t.input)}
        moe = spec.family.moe if spec.is_sparse(layer) else None
        self.router = weights[f"model.layers.{layer}.{moe.router}"] if moe else None
        self.fluctuations = {key: Fluctuation.zeros(weight.shape[1]) for key, weight in self.readers.items()}
        experts = spec.experts if moe else 0
        self.gains = torch.zeros(experts, dtype=torch.float64)
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.logits = torch.zeros(experts, experts, dtype=torch.float64)
        self.turn, self.tokens = 0.0, 0

    def see(self, key: str, x: Tensor, gate: Tensor | None) -> None:
        if key == "router" and self.router is not None:
            logits = (x @ self.router.T).double()
            self.logits += logits.T @ logits
        if key not in self.fluctuations:
            return
        self.fluctuations[key].add(x, gate)
        if gate is not None:
            expert = int(key.split(".")[1])
            self.gains[expert] += reap_terms(x, self.readers[key], gate).double().sum()
            self.counts[expert] += len(x)

    def passed(self, before: Tensor, after: Tensor) -> None:
        self.turn += float(block_influence(before, after).double().sum())
        self.tokens += before.shape[0] * before.shape[1]

    def scores(self) -> LayerScores:
        metrics = {key: f.metric(self.readers[key]) * (f.weight / self.tokens) for key, f in self.fluctuations.items()}
        heads = metrics.pop("attention.out").view(self.spec.kv_heads, -1).sum(1)
        return LayerScores(
            self.turn / self.tokens,
            heads,
            {key.removesuffix(".act"): metric for key, metric in metrics.items()},
            self.gains / self.counts.clamp_min(1.0),
            self.counts / self.counts.sum().clamp_min(1.0),
            cosines(self.logits),
        )


class _Outliers:
    """Collects the input norms of one block."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Mapping[str, Tensor]):
        self.matrices = [
            (t.input, weights[t.name].abs())
            for t in spec.block_tensors(layer)
            if t.input is not None and t.role != "router"
        ]
        self.squares = {key: torch.zeros(weight.shape[1], dtype=torch.float64) for key, weight in self.matrices}
        self.tokens = 0

    def see(self, key: str, x: Tensor, gate: Tensor | None) -> None:
        if key in self.squares:
            self.squares[key] += (x if gate is None else x * gate[:, None]).double().square().sum(0)

    def passed(self, before: Tensor, after: Tensor) -> None:
        self.tokens += before.shape[0] * before.shape[1]

    def share(self, threshold: float) -> float:
        norms = {key: (squares / self.tokens).sqrt().float() for key, squares in self.squares.items()}
        size = sum(weight.numel() for _, weight in self.matrices)
        mean = sum(float(weight.double().sum(0) @ norms[key].double()) for key, weight in self.matrices) / size
        above = sum(int((weight * norms[key] > threshold * mean).sum()) for key, weight in self.matrices)
        return above / size


def _reads_inner(key: str | None) -> bool:
    """Whether an input is that of o_proj or of a down_proj."""
    return key is not None and key.endswith((".out", ".act"))
