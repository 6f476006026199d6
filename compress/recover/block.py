"""Recovery at no bytes: once a block's codes are known, tune what it keeps in float until it does what the original did.

Solvers look at one linear at a time. Here the whole block runs, softmax, routing and activations included, on the
calibration activations of the compressed model, and gradients reach norms, router, biases and the stored scales. The
squared error e of the block's output is weighed by what the original's loss feels of it: with g the gradient of the
next-token loss at that output, the KL divergence that e causes is e^T E[g g^T] e / 2 to second order. BRECQ (arXiv
2102.05426) takes the diagonal of this Fisher information for blocks, here it is whole; scales as parameters are LSQ's
(arXiv 1902.08153).

Every candidate is rounded to what is stored before it is judged on windows that were not tuned on; a block that is
no better there stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs.base import TINY
from compress.limits import BATCH_TOKENS
from compress.models.forward import forward_block
from compress.recover.parameters import (
    Adam,
    Judged,
    Stored,
    Tuned,
    held_out_windows,
    plain_outcome,
    step_share,
    still_values,
    tunables,
)
from compress.solve.tensor import Outcome
from compress.solvers.options import RecoverOptions
from compress.streaming.activations import Activations
from compress.streaming.walk import BlockAt


@dataclass(frozen=True)
class Recovered(Judged):
    """outcomes, floats: of the whole block, by checkpoint name, tuned where `kept` and as given where not; before,
    after: relative error on the held-out windows, of the block as given and of the best candidate; epochs: how many
    ran; reason: why nothing was kept, else empty."""

    outcomes: Mapping[str, Outcome]
    floats: Mapping[str, Tensor]
    before: float
    after: float
    kept: bool
    epochs: int
    reason: str = ""


@dataclass(frozen=True)
class SolvedBlock:
    """A block whose codes are known. outcomes: its solved tensors, by checkpoint name; floats: all others, float32 as
    stored; stored_as: their codecs."""

    block: BlockAt
    outcomes: Mapping[str, Outcome]
    floats: Mapping[str, Tensor]
    stored_as: Mapping[str, str]


def recover_block(
    solved: SolvedBlock,
    source: Activations,
    target: Activations,
    options: RecoverOptions,
    *,
    metric: Tensor | None = None,
    seed: int = 0,
) -> Recovered:
    """Tune a block to map `source` to `target`.

    source: the compressed model's activations at the block's input, [windows, length, hidden]; target: the
    original's at its output; metric: [hidden, hidden], positive semi-definite, the weight of output errors (None:
    plain squared error). The same seed gives the same bytes on the same machine and thread count.
    """
    outcomes, floats = solved.outcomes, solved.floats
    with torch.inference_mode(False), torch.enable_grad():
        given = {name: plain_outcome(outcome) for name, outcome in outcomes.items()}
        constants = {name: value.clone() for name, value in floats.items()}
        tuned = tunables(solved.block, given, constants, solved.stored_as, options)
        windows = source.shape[0]
        held = held_out_windows(windows, options)
        if not tuned or held >= windows:
            reason = "nothing to tune" if not tuned else "too few calibration windows to hold any out"
            return Recovered(outcomes, floats, 0.0, 0.0, False, 0, reason)
        weigh = None if metric is None else metric.clone()
        problem = _Problem(solved.block, source, target, weigh, windows - held)
        still = still_values(given, constants, tuned)
        before = problem.held_out_error(still | {name: t.dense().detach() for name, t in tuned.items()})
        best, after, epochs, reason = _descend(
            problem, tuned, still, before, options, seed * 1_000_003 + solved.block.layer
        )
        if best is None:
            return Recovered(outcomes, floats, before, after, False, epochs, reason)
        return Recovered(
            {**outcomes, **best.outcomes},
            {**floats, **best.floats},
            before,
            after,
            True,
            epochs,
        )


@dataclass(frozen=True)
class _Problem:
    """One block's inputs and wanted outputs: windows before `training` to tune on, the others to judge by."""

    block: BlockAt
    source: Activations
    target: Activations
    metric: Tensor | None
    training: int

    @property
    def batch(self) -> int:
        """Windows of one step."""
        return max(1, BATCH_TOKENS // self.source.shape[1])

    def energy(self, values: Tensor) -> Tensor:
        """Sum of v^T metric v over tokens. values: [..., hidden]."""
        if self.metric is None:
            return values.square().sum()
        rows = values.reshape(-1, values.shape[-1])
        return ((rows @ self.metric) * rows).sum()

    def error(self, weights: Mapping[str, Tensor], inputs: Tensor, wanted: Tensor) -> Tensor:
        """Energy of what the block misses."""
        return self.energy(forward_block(self.block.spec, self.block.layer, weights, inputs) - wanted)

    def held_out_error(self, weights: Mapping[str, Tensor]) -> float:
        """Energy missed over energy wanted, on the held-out windows."""
        missed = total = 0.0
        with torch.no_grad():
            for start in range(self.training, self.source.shape[0], self.batch):
                at = (start, min(start + self.batch, self.source.shape[0]))
                wanted = self.target.read(*at)
                missed += float(self.error(weights, self.source.read(*at), wanted))
                total += float(self.energy(wanted))
        return missed / max(total, TINY)

    def windows(self, picks: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and wanted outputs of some windows."""
        inputs, wanted = (torch.cat([at.read(i, i + 1) for i in picks]) for at in (self.source, self.target))
        return inputs, wanted


def _descend(
    problem: _Problem,
    tuned: Mapping[str, Tuned],
    still: Mapping[str, Tensor],
    before: float,
    options: RecoverOptions,
    seed: int,
) -> tuple[Stored | None, float, int, str]:
    """Adam with a cosine schedule; after each epoch what is rounded is judged.

    Returns the best stored values (None when none beats `before`), their held-out error, epochs run, and why none.
    """
    optimizer = Adam([step for t in tuned.values() for step in t.steps])
    generator = torch.Generator().manual_seed(seed)
    total = options.epochs * -(-problem.training // problem.batch)
    best: Stored | None = None
    least, after, stale, taken = before, math.inf, 0, 0
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(problem.training, generator=generator).tolist()
        for start in range(0, problem.training, problem.batch):
            inputs, wanted = problem.windows(order[start : start + problem.batch])
            scale = problem.energy(wanted).clamp_min(TINY)
            loss = problem.error({**still, **{name: t.dense() for name, t in tuned.items()}}, inputs, wanted) / scale
            if not torch.isfinite(loss):
                return best, min(least, after), epoch, "the loss is not finite"
            loss.backward()
            optimizer.step(step_share(taken, total))
            taken += 1
        candidate = Stored.of(tuned)
        after_epoch = problem.held_out_error({**still, **candidate.dense()})
        after = min(after, after_epoch) if math.isfinite(after_epoch) else after
        stale = 0 if after_epoch < least else stale + 1
        if after_epoch < least:
            best, least = candidate, after_epoch
        if stale >= options.patience:
            break
    reason = "" if best is not None else "no better on the held-out windows"
    return best, least if best is not None else after, epoch, reason
