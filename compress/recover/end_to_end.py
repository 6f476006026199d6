"""The last stage of recovery: once every code is known, tune what the whole model keeps in float, end to end.

`recover.py` repairs a block for the original's own output of that block. What is left over adds up; here norms,
router, biases and stored scales of all blocks and the final norm move together, downhill on the KL divergence from the
original's next-token distribution (knowledge distillation, arXiv 1503.02531; scales tuned end to end behind
block-wise training are EfficientQAT's second phase, arXiv 2407.11062). Embeddings and head keep their bytes.

One block is dense at a time: a step runs forward without gradients, keeps the batch at the input of every block, and
goes back block by block, each run again with its graph and moved as soon as its gradient is known. Parameters and
Adam's moments (about a hundredth of the weights, several times as much where finely quantized weights are tuned) and
the batch at the blocks' inputs lie in mapped files, of which the operating system keeps in memory what fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs import float_codec
from compress.decode import decode
from compress.limits import BATCH_TOKENS, LOGIT_VALUES
from compress.models.forward import final_norm, forward_block, logits
from compress.models.spec import ModelSpec
from compress.recover.parameters import (
    Adam,
    Judged,
    Stored,
    Tuned,
    TunedFloat,
    held_out_windows,
    step_share,
    still_values,
    tunables,
)
from compress.solve.tensor import Outcome
from compress.solvers.options import RecoverOptions
from compress.streaming.activations import Activations
from compress.streaming.walk import BlockAt, walk
from compress.weights import Packed

CHANGE, MEAN, SQUARE, BEST = range(4)  # rows of a block's state: its parameters, Adam's moments, the best so far


@dataclass(frozen=True)
class Finetuned(Judged):
    """before, after: mean KL divergence from the original on the held-out windows, nats a token, of the model as given
    and of the best candidate; norm: the final norm as it ships, where it was tuned and kept; reason: why nothing was
    kept, else empty."""

    norm: Packed | None
    before: float
    after: float
    kept: bool
    epochs: int
    reason: str = ""


@dataclass(frozen=True)
class Compressed:
    """A model whose blocks are all solved. fetch(name): a tensor as it ships; outcomes(layer): a block's solved ones;
    head: float32 [vocabulary, hidden], as it ships; inputs: its embeddings of the calibration windows, [windows, length,
    hidden]."""

    spec: ModelSpec
    fetch: Callable[[str], Packed]
    outcomes: Callable[[int], Mapping[str, Outcome]]
    head: Tensor
    inputs: Activations

    def blocks(self, *, backwards: bool = False) -> Iterator[BlockAt]:
        """One after the other."""
        return walk(self.spec, lambda name: decode(self.fetch(name)), backwards=backwards)


@dataclass(frozen=True)
class Original:
    """What to come close to. states: at the output of the last block, [windows, length, hidden]; norm, head: float32
    [hidden] and [vocabulary, hidden]."""

    states: Activations
    norm: Tensor
    head: Tensor


def finetune(
    model: Compressed,
    original: Original,
    options: RecoverOptions,
    scratch: Callable[..., Tensor],
    write: Callable[[int, Mapping[str, Packed]], None],
    progress: Callable[[float], None] = lambda done: None,
    *,
    seed: int = 0,
) -> Finetuned:
    """Tune all blocks together and hand what moved to `write(layer, tensors)`, where it is kept.

    scratch(name, *shape): float32 zeros that need not stay in memory. The same seed gives the same bytes on the same machine and thread count.
    """
    with torch.inference_mode(False):
        windows = model.inputs.shape[0]
        training = windows - held_out_windows(windows, options)
        if training < 1:
            return Finetuned(None, 0.0, 0.0, False, 0, "too few calibration windows to hold any out")
        run = _Run(model, original, options, scratch, training)
        before = run.held_out_divergence(stored=False)
        if not run.tuned:
            return Finetuned(None, before, before, False, 0, "nothing to tune")
        after, epochs, reason = _descend(run, before, options, progress, seed)
        if reason:
            return Finetuned(None, before, after, False, epochs, reason)
        for block in model.blocks():
            if tensors := run.packed(block):
                write(block.layer, tensors)
        return Finetuned(run.packed_norm(), before, after, True, epochs)


def _descend(
    run: _Run, before: float, options: RecoverOptions, progress: Callable[[float], None], seed: int
) -> tuple[float, int, str]:
    """Adam with a cosine schedule; after each epoch what is rounded is judged, and remembered if it is the best.

    Returns the least held-out divergence of a candidate, epochs run, and why none is better than `before`.
    """
    generator = torch.Generator().manual_seed(seed)
    total = options.end_to_end * -(-run.training // run.batch)
    after, kept, stale, taken = math.inf, False, 0, 0
    reason = "no better on the held-out windows"
    for epoch in range(1, options.end_to_end + 1):
        order = torch.randperm(run.training, generator=generator).tolist()
        for start in range(0, run.training, run.batch):
            if not run.step(order[start : start + run.batch], taken, step_share(taken, total)):
                return after, epoch, "" if kept else "the loss is not finite"
            taken += 1
            progress(taken / (total + 1))
        divergence = run.held_out_divergence(stored=True)
        stale = 0 if divergence < min(before, after) else stale + 1
        if not stale:
            run.remember()
            kept = True
        after = min(after, divergence) if math.isfinite(divergence) else after
        if stale >= options.patience:
            break
    progress(1.0)
    return after, epoch, "" if kept else reason


class _Run:
    """The model while it is tuned."""

    def __init__(
        self,
        model: Compressed,
        original: Original,
        options: RecoverOptions,
        scratch: Callable[..., Tensor],
        training: int,
    ):
        self.model, self.spec, self.original, self.inputs = model, model.spec, original, model.inputs
        self.options, self.scratch, self.training = options, scratch, training
        windows, length, hidden = model.inputs.shape
        self.batch = max(1, BATCH_TOKENS // length)  # windows of one step
        self.held_out = windows - training
        self.places = scratch("states", self.spec.layers + 1, min(self.batch, training), length, hidden)
        self.held = scratch("held-out", self.held_out, length, hidden)
        self.states: dict[int, Tensor] = {}
        norm = model.fetch(self.spec.final_norm)
        self.norm = TunedFloat(decode(norm), norm.codec, options.lr_floats)
        self.norm_optimizer = Adam(self.norm.steps if "norms" in options.tune else [])
        self.best_norm = torch.zeros_like(self.norm.change)

    @property
    def tuned(self) -> bool:
        """Whether there is anything to tune; known once every block was read."""
        return bool(self.norm_optimizer.steps) or any(state.numel() for state in self.states.values())

    # -- one block -------------------------------------------------------------------------------------------------
    def read(self, block: BlockAt, row: int = CHANGE) -> tuple[dict[str, Tuned], dict[str, Tensor], Adam]:
        """A block's tunables with the parameters of a row of its state, its other tensors, and its optimizer."""
        layer = block.layer
        outcomes = self.model.outcomes(layer)
        names = [t.name for branch in block.branches for t in branch.tensors if t.name not in outcomes]
        floats = {name: block.load(name) for name in names}
        stored_as = {name: self.model.fetch(name).codec for name in names}
        tuned = tunables(block, outcomes, floats, stored_as, self.options)
        steps = [step for t in tuned.values() for step in t.steps]
        if layer not in self.states:
            self.states[layer] = self.scratch(f"state-{layer:05d}", 4, sum(p.numel() for p, _ in steps))
        parts = self.states[layer].split([p.numel() for p, _ in steps], dim=1) if steps else []
        for (parameter, _), part in zip(steps, parts, strict=True):
            parameter.data = part[row].view(parameter.shape)
        moments = [
            (part[MEAN].view(p.shape), part[SQUARE].view(p.shape)) for (p, _), part in zip(steps, parts, strict=True)
        ]
        return tuned, still_values(outcomes, floats, tuned), Adam(steps, moments)

    def weights(self, block: BlockAt, *, stored: bool) -> dict[str, Tensor]:
        """A block's dense tensors without a graph, as they are tuned or as they would be stored."""
        with torch.no_grad():
            tuned, still, _ = self.read(block)
            if stored:
                return still | Stored.of(tuned).dense()
            return still | {name: t.dense() for name, t in tuned.items()}

    def packed(self, block: BlockAt) -> dict[str, Packed]:
        """What ships of the best candidate's tuned tensors."""
        tuned, _, _ = self.read(block, BEST)
        stored = Stored.of(tuned)
        floats = {name: float_codec(self.model.fetch(name).codec).encode(v) for name, v in stored.floats.items()}
        return floats | {name: outcome.pack() for name, outcome in stored.outcomes.items()}

    def packed_norm(self) -> Packed | None:
        """The final norm of the best candidate, where it is tuned."""
        if not self.norm_optimizer.steps:
            return None
        self.norm.change.data.copy_(self.best_norm)
        return float_codec(self.norm.codec).encode(self.norm.stored())

    def remember(self) -> None:
        """The present parameters are the best so far."""
        for state in self.states.values():
            if state.numel():
                state[BEST].copy_(state[CHANGE])
        self.best_norm.copy_(self.norm.change.detach())

    # -- the whole model -------------------------------------------------------------------------------------------
    def step(self, picks: list[int], taken: int, share: float) -> bool:
        """Move everything by the gradient on some windows; False and nothing where the loss is not finite."""
        count = len(picks)
        for slot, window in enumerate(picks):
            self.places[0, slot] = self.inputs.read(window, window + 1)[0]
        for block in self.model.blocks():
            layer = block.layer
            with torch.no_grad():
                weights = self.weights(block, stored=False)
                self.places[layer + 1, :count] = forward_block(self.spec, layer, weights, self.places[layer, :count])
        loss, gradient = self.loss_gradient(self.places[self.spec.layers, :count], picks)
        if not math.isfinite(loss):
            return False
        self.norm_optimizer.step(share)
        for block in self.model.blocks(backwards=True):
            gradient = self.step_block(block, self.places[block.layer, :count], gradient, taken, share)
        return True

    def step_block(self, block: BlockAt, inputs: Tensor, gradient: Tensor, taken: int, share: float) -> Tensor:
        """Move one block, given the gradient at its output. Returns that at its input."""
        tuned, still, optimizer = self.read(block)
        inputs = inputs.clone().requires_grad_()
        with torch.enable_grad():
            weights = still | {name: t.dense() for name, t in tuned.items()}
            forward_block(self.spec, block.layer, weights, inputs).backward(gradient)
        optimizer.taken = taken
        optimizer.step(share)
        assert inputs.grad is not None
        return inputs.grad

    def loss_gradient(self, states: Tensor, picks: list[int]) -> tuple[float, Tensor]:
        """Mean KL divergence of some windows and its gradient at the last block's output, [windows, length, hidden];
        that of the final norm is left with it."""
        out, total = torch.empty_like(states), 0.0
        for slot, window in enumerate(picks):
            wanted = self.original.states.read(window, window + 1)[0]
            for rows in self.chunks():
                hidden = states[slot, rows].clone().requires_grad_()
                with torch.enable_grad():
                    loss = self.divergence(hidden, self.norm.dense(), wanted[rows]) / states[..., 0].numel()
                loss.backward()
                assert hidden.grad is not None
                out[slot, rows] = hidden.grad
                total += float(loss.detach())
        return total, out

    def divergence(self, hidden: Tensor, norm: Tensor, wanted: Tensor) -> Tensor:
        """Summed KL divergence from the original. hidden, wanted: [tokens, hidden], outputs of the last block."""
        with torch.no_grad():
            states = final_norm(self.spec, self.original.norm, wanted)
            p = logits(self.spec, self.original.head, states).log_softmax(-1)
        q = logits(self.spec, self.model.head, final_norm(self.spec, norm, hidden)).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    def chunks(self) -> list[slice]:
        """A window's tokens in pieces whose logits are few enough."""
        length, size = self.inputs.shape[1], max(1, LOGIT_VALUES // self.spec.vocab_size)
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    @torch.no_grad()
    def held_out_divergence(self, *, stored: bool) -> float:
        """Mean KL divergence from the original on the held-out windows, of the model as tuned or as it would be stored."""
        parts = [(start, min(start + self.batch, self.held_out)) for start in range(0, self.held_out, self.batch)]
        for start, stop in parts:
            self.held[start:stop] = self.inputs.read(self.training + start, self.training + stop)
        for block in self.model.blocks():
            weights = self.weights(block, stored=stored)
            for start, stop in parts:
                self.held[start:stop] = forward_block(self.spec, block.layer, weights, self.held[start:stop])
        norm = self.norm.stored() if stored else self.norm.dense()
        total = 0.0
        for slot in range(self.held_out):
            wanted = self.original.states.read(self.training + slot, self.training + slot + 1)[0]
            total += sum(float(self.divergence(self.held[slot, rows], norm, wanted[rows])) for rows in self.chunks())
        return total / self.held[..., 0].numel()
