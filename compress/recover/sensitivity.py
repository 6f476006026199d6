"""How much the original's loss feels an error at each block's output: the Fisher information of the hidden states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.forward import final_norm, logits
from compress.models.spec import ModelSpec
from compress.streaming.activations import Activations
from compress.streaming.placement import CPU, Placement
from compress.streaming.walk import Scratch, embed, walk
from compress.weights import Loader


def output_sensitivity(
    spec: ModelSpec,
    load: Loader,
    ids: np.ndarray,
    scratch: Scratch,
    seed: int = 0,
    placement: Placement = CPU,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Tensor]:
    """E[g g^T] of every block's output, float32 [hidden, hidden] each, g the gradient of the next-token loss there.

    Next tokens are drawn from the original's own prediction, which makes this the Fisher information. load(name) gives
    a checkpoint tensor; ids: [windows, length]; scratch(name): activation files of the ids' shape, deleted when done.
    One pass forward and one backward, one block in memory at a time; progress receives the share that is done.
    """
    streams = [scratch(f"survey-{layer:05d}") for layer in range(spec.layers + 1)]
    parts = streams[0].batches
    with torch.inference_mode(False):
        table = load(spec.embeddings)
        with torch.no_grad():
            embed(spec, table, ids, streams[0])
        for block in walk(spec, load, placement):
            with torch.no_grad(), streams[block.layer + 1].writing() as out:
                for at in parts:
                    out.append(block.forward(streams[block.layer].read(*at)))
            progress((block.layer + 1) / (3 * spec.layers))  # backward takes twice as long
        gradient = scratch("survey-gradient")
        head = placement.weight(table if spec.tied else load(spec.head))
        _head_gradient(spec, placement.weight(load(spec.final_norm)), head, streams[-1], gradient, seed)
        streams[-1].delete()
        metrics = []
        for block in walk(spec, load, placement, backwards=True):
            metric = torch.zeros(spec.hidden_size, spec.hidden_size, device=placement.device)
            below = scratch(f"survey-gradient-{block.layer:05d}")
            with below.writing() as out:
                for at in parts:
                    above = gradient.read(*at)
                    metric.addmm_(above.flatten(0, 1).T, above.flatten(0, 1))
                    inputs = streams[block.layer].read(*at).requires_grad_()
                    with torch.enable_grad():
                        (felt,) = torch.autograd.grad(block.forward(inputs), inputs, above)
                    out.append(felt)
            metrics.append((metric / ids.size).cpu())
            gradient.delete()
            streams[block.layer].delete()
            gradient = below
            progress(1 - 2 * block.layer / (3 * spec.layers))
        gradient.delete()
    return metrics[::-1]


def _head_gradient(
    spec: ModelSpec, norm: Tensor, head: Tensor, states: Activations, out: Activations, seed: int
) -> None:
    """Gradient of the summed next-token loss at the last block's output, one window at a time."""
    generator = torch.Generator().manual_seed(seed)
    with out.writing() as file:
        for window in range(states.shape[0]):
            hidden = states.read(window, window + 1)[0].requires_grad_()
            with torch.enable_grad():
                scores = logits(spec, head, final_norm(spec, norm, hidden))
                # drawn on the CPU, so that a seed draws the same everywhere
                drawn = torch.multinomial(scores.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(scores, drawn.to(scores.device), reduction="sum")
            (felt,) = torch.autograd.grad(loss, hidden)
            file.append(felt[None])
