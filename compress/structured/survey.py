"""One pass of the original model over the calibration windows that tells what its layers, experts, heads and channels
are worth; one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.models.forward import Taps
from compress.models.spec import ModelSpec
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import BlockAt, Scratch, embed, walk
from compress.structured.scores import Fluctuation, block_influence, cosines, reap_terms
from compress.weights import Loader


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
    placement: Placement = CPU,
) -> list[LayerScores]:
    """Scores of every layer.

    load(name) gives a tensor of `spec`; ids: [windows, length]; scratch(name): activation files of the ids' shape,
    deleted when done. Raises NumericalError naming the block whose output is not finite.
    """
    scores = []
    for watch in _watched(spec, load, ids, scratch, _Scorer, placement):
        scores.append(watch.scores())
        progress(len(scores) / spec.layers)
    return scores


def outlier_ratios(
    spec: ModelSpec,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    threshold: float = 5.0,
    placement: Placement = CPU,
) -> list[float]:
    """Share of each layer's weights that are outliers: |W_ij| |x_j| above `threshold` times the layer's mean (OWL, arXiv
    2310.05175).

    |x_j| is the root mean square of the input over all tokens, for routed experts times the routing weight, 0 where
    a token goes elsewhere. Counted over all matrices of a block but routers. Arguments as of `survey`.
    """
    return [watch.share(threshold) for watch in _watched(spec, load, ids, scratch, _Outliers, placement)]


def _watched(
    spec: ModelSpec,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    begin: Callable[[BlockAt], W],
    placement: Placement,
) -> Iterator[W]:
    """Run the model over all windows; yields what `begin(block)` made, once it has seen all of them."""
    source = scratch(f"survey-{0:05d}")
    embed(spec, load(spec.embeddings), ids, source)
    for block in walk(spec, load, placement):
        watch, target = begin(block), scratch(f"survey-{block.layer + 1:05d}")
        taps = Taps(watch.see)
        with torch.no_grad(), target.writing() as out:
            for start, stop in source.batches:
                hidden = source.read(start, stop)
                after = block.forward(hidden, taps)
                if not torch.isfinite(after).all():
                    raise NumericalError(
                        f"the output of block {block.layer} is not finite for calibration samples from {start} on; "
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

    def __init__(self, block: BlockAt):
        self.inputs = {key: given for branch in block.branches for key, given in branch.inputs.items()}
        tensors = [t for branch in block.branches for t in branch.tensors]
        weights, device = block.weights, block.placement.device
        # what parts are judged by is read by the last linear of their sub-layer
        self.readers = {t.input: weights[t.name] for t in tensors if t.declared.writes and t.input}
        self.axes = {
            t.input: t.declared.axes[-1] if t.declared.axes else None for t in tensors if t.input in self.readers
        }
        router = next((t for t in tensors if t.role == "router" and t.declared.axes), None)
        self.router = None if router is None else weights[router.name]
        self.fluctuations = {
            key: Fluctuation.zeros(weight.shape[1], device=device) for key, weight in self.readers.items()
        }
        experts = 0 if self.router is None else len(self.router)
        self.gains = torch.zeros(experts, dtype=torch.float64)
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.logits = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        self.turn, self.tokens = 0.0, 0

    def see(self, key: str, x: Tensor, gate: Tensor | None) -> None:
        if key == "router" and self.router is not None:
            logits = (x @ self.router.T).double()
            self.logits += logits.T @ logits
        if key not in self.fluctuations:
            return
        self.fluctuations[key].add(x, gate)
        if gate is not None:
            expert = self.inputs[key].expert
            assert expert is not None
            self.gains[expert] += reap_terms(x, self.readers[key], gate).double().sum().cpu()
            self.counts[expert] += len(x)

    def passed(self, before: Tensor, after: Tensor) -> None:
        self.turn += float(block_influence(before, after).double().sum())
        self.tokens += before.shape[0] * before.shape[1]

    def scores(self) -> LayerScores:
        metrics = {key: f.metric(self.readers[key]) * (f.weight / self.tokens) for key, f in self.fluctuations.items()}
        heads, channels = torch.zeros(0, dtype=torch.float64), {}
        for key, metric in metrics.items():
            axis = self.axes[key]
            if axis is None:
                continue
            if axis.of == "kv_heads":
                heads = metric.view(-1, axis.run).sum(1).cpu()
            else:
                channels[axis.of] = metric.cpu()
        return LayerScores(
            self.turn / self.tokens,
            heads,
            channels,
            self.gains / self.counts.clamp_min(1.0),
            self.counts / self.counts.sum().clamp_min(1.0),
            cosines(self.logits).cpu(),
        )


class _Outliers:
    """Collects the input norms of one block."""

    def __init__(self, block: BlockAt):
        self.matrices = [
            (t.input, block.weights[t.name].abs())
            for branch in block.branches
            for t in branch.tensors
            if t.input is not None and t.role != "router"
        ]
        self.squares = {
            key: torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
            for key, weight in self.matrices
        }
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
