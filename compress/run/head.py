"""Moments of what the language-model head sees."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from compress.engines.streamed import StreamedSource
from compress.models.forward import final_norm
from compress.models.spec import ModelSpec
from compress.statistics import Moments, Statistics, blend
from compress.streaming.activations import Activations
from compress.streaming.placement import Placement
from compress.streaming.walk import Streams
from compress.weights import Loader


def head_statistics(spec: ModelSpec, norm: Tensor, streams: Streams, drift: bool) -> Statistics:
    """Moments of the final hidden states after the last norm, whose stored weights are `norm`."""
    moments = Moments.zeros(spec.hidden_size, drift=drift and streams.original is not None, device=norm.device)
    for start, stop in streams.compressed.batches:

        def states(stream: Activations, start: int = start, stop: int = stop) -> Tensor:
            return final_norm(spec, norm, stream.read(start, stop)).reshape(-1, spec.hidden_size)

        reference = states(streams.original) if moments.drift is not None and streams.original is not None else None
        moments.add(states(streams.compressed), reference)
    return blend(moments, None, 0.0)


def survey_head(spec: ModelSpec, load: Loader, ids: np.ndarray, placement: Placement) -> Statistics:
    """Moments of what the original model's head sees on some windows of text, one block in memory at a time.

    load(name) gives a checkpoint tensor; ids: [windows, length].
    """
    moments = Moments.zeros(spec.hidden_size, device=placement.device)
    for states in StreamedSource(spec, load, "original", placement).final_states(list(ids)):
        moments.add(states)
    return blend(moments, None, 0.0)
