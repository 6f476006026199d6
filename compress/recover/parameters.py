"""What recovery tunes: everything that is stored as a real number, as parameters that start at zero.

A tensor's codes stay; norms, router, biases and stored scales move, and so do the weights of finely quantized tensors,
which are rounded again to their own scales. What a parameter set stands for is always rounded to what is stored
before it is judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.codecs import float_codec
from compress.codecs.scales import TINY, safe_divisor
from compress.limits import CODES_FROM_BITS
from compress.solve.tensor import Outcome
from compress.solvers.base import Solution
from compress.solvers.options import RecoverOptions
from compress.streaming.walk import BlockAt

WARM_UP = 5  # steps until the full step size
BETAS = (0.9, 0.95)


class Judged:
    """What was judged on held-out windows, and kept or not."""

    before: float
    after: float
    kept: bool
    epochs: int
    reason: str

    @property
    def report(self) -> dict[str, float | int | bool | str]:
        """For the journal."""
        facts: dict[str, float | int | bool | str] = {
            "before": self.before,
            "after": self.after,
            "kept": self.kept,
            "epochs": self.epochs,
        }
        return facts if self.kept else {**facts, "reason": self.reason}


class Tuned(Protocol):
    """Something that is stored, with parameters that start at zero, where it is as it was given."""

    steps: list[tuple[Tensor, float]]
    """Parameters and their step sizes."""

    def dense(self) -> Tensor:
        """The float32 tensor that a block computes with, differentiable."""
        ...

    def stored(self) -> Outcome | Tensor:
        """The nearest that can be stored."""
        ...


class TunedFloat:
    """A norm, router or bias, stored in a float type; parameters are in units of its root mean square."""

    def __init__(self, values: Tensor, codec: str, rate: float):
        self.values, self.codec = values, codec
        self.size = values.square().mean().sqrt()
        self.change = torch.zeros_like(values, requires_grad=True)
        self.steps = [(self.change, rate)]

    def dense(self) -> Tensor:
        return self.values + self.change * self.size

    def stored(self) -> Tensor:
        codec = float_codec(self.codec)
        return codec.unpack(codec.encode(self.dense().detach()))


class TunedScales:
    """A quantized tensor with its codes fixed: each stored real number gets a factor."""

    def __init__(self, outcome: Outcome, rate: float):
        solution = outcome.solution
        self.outcome, grid, units = outcome, solution.grid, solution.units
        # the columns that each stored number has a say in, one row of the last dimension a number
        self.terms = [
            term.reshape(*stored.shape, units.shape[1] // stored.shape[1])
            for term, stored in zip(grid.terms(units, solution.codec.columns), grid.reals, strict=True)
        ]
        self.changes = [torch.zeros_like(stored, requires_grad=True) for stored in grid.reals]
        self.steps = [(change, rate) for change in self.changes]

    def dense(self) -> Tensor:
        first, *others = (term * (1 + change)[..., None] for term, change in zip(self.terms, self.changes, strict=True))
        return self.outcome.restore(sum(others, first).reshape(self.outcome.solution.units.shape))

    def stored(self) -> Outcome:
        solution = self.outcome.solution
        grid = solution.codec.rescaled(solution.grid, *(1 + change.detach() for change in self.changes))
        return replace(self.outcome, solution=replace(solution, grid=grid))


class TunedCodes:
    """A finely quantized tensor, tuned as float and rounded again to its own scales; parameters are in units of its root
    mean square."""

    def __init__(self, outcome: Outcome, rate: float):
        self.outcome = outcome
        self.values = outcome.solution.decode()
        self.size = self.values.square().mean().sqrt()
        self.change = torch.zeros_like(self.values, requires_grad=True)
        self.steps = [(self.change, rate)]

    def dense(self) -> Tensor:
        return self.outcome.restore(self.values + self.change * self.size)

    def stored(self) -> Outcome:
        solution = self.outcome.solution
        moved = self.values + self.change.detach() * self.size
        return replace(self.outcome, solution=replace(solution, units=nearest_units(solution, moved)))


def nearest_units(solution: Solution, weight: Tensor) -> Tensor:
    """Codes of `weight` [R, n] nearest under the solution's own scales, one column at a time. Returns units [R, n]."""
    codec, grid = solution.codec, solution.grid
    target = (grid.raised(weight, codec.columns) / codec.columns(safe_divisor(grid.scale))).reshape(-1, 1)
    zero = grid.zero_points(lambda values: codec.columns(values).reshape(-1))
    return codec.nearest(target, torch.ones_like(target), None, zero).reshape(weight.shape)


def tunables(
    block: BlockAt,
    outcomes: Mapping[str, Outcome],
    floats: Mapping[str, Tensor],
    stored_as: Mapping[str, str],
    options: RecoverOptions,
) -> dict[str, Tuned]:
    """What the options name, in the order of the block's tensors."""
    tuned: dict[str, Tuned] = {}
    for tensor in (t for branch in block.branches for t in branch.tensors):
        name = tensor.name
        if name in outcomes:
            codec = outcomes[name].solution.codec
            fine = codec.step == 1 and codec.bits_per_weight(tensor.shape[-1]) >= CODES_FROM_BITS
            if fine and "codes" in options.tune:
                tuned[name] = TunedCodes(outcomes[name], options.lr_codes)
            elif "scales" in options.tune:
                tuned[name] = TunedScales(outcomes[name], options.lr_scales)
        elif tensor.role in options.tune:
            tuned[name] = TunedFloat(floats[name], stored_as[name], options.lr_floats)
    return tuned


class Adam:
    """Adam (arXiv 1412.6980) with a step size for each parameter. torch's own loads its compiler on the first step.

    moments, taken: where an earlier instance stopped; the moments are moved in place.
    """

    def __init__(
        self,
        steps: Sequence[tuple[Tensor, float]],
        moments: Sequence[tuple[Tensor, Tensor]] | None = None,
        taken: int = 0,
    ):
        self.steps = steps
        self.moments = moments or [(torch.zeros_like(p), torch.zeros_like(p)) for p, _ in steps]
        self.taken = taken

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move by `share` of every step size and clear the gradients."""
        self.taken += 1
        first, second = (1 - beta**self.taken for beta in BETAS)
        for (parameter, rate), (mean, square) in zip(self.steps, self.moments, strict=True):
            if parameter.grad is None:  # an expert that no token of the batch reached
                continue
            mean.lerp_(parameter.grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
            parameter.addcdiv_(mean, (square / second).sqrt_().add_(TINY), value=-share * rate / first)
            parameter.grad = None


def step_share(taken: int, total: int) -> float:
    """What part of the full step size the step after `taken` of `total` has: a short warm-up, then a cosine."""
    return min(1.0, (taken + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * taken / total))


def held_out_windows(windows: int, options: RecoverOptions) -> int:
    """How many windows at the end of the calibration set judge and are never tuned on."""
    return max(1, math.ceil(options.held_out * windows))


def still_values(
    outcomes: Mapping[str, Outcome], floats: Mapping[str, Tensor], tuned: Mapping[str, Tuned]
) -> dict[str, Tensor]:
    """The dense float32 tensors of a block that are not tuned."""
    fixed = {name: outcome.dense() for name, outcome in outcomes.items() if name not in tuned}
    return fixed | {name: value for name, value in floats.items() if name not in tuned}


@dataclass(frozen=True)
class Stored:
    """Tuned tensors as they can be stored, by checkpoint name. outcomes: those that have codes; floats: the others,
    float32."""

    outcomes: Mapping[str, Outcome]
    floats: Mapping[str, Tensor]

    @classmethod
    def of(cls, tuned: Mapping[str, Tuned]) -> Stored:
        """What the present parameters come to."""
        stored = {name: t.stored() for name, t in tuned.items()}
        return cls(
            {name: value for name, value in stored.items() if isinstance(value, Outcome)},
            {name: value for name, value in stored.items() if isinstance(value, Tensor)},
        )

    def dense(self) -> dict[str, Tensor]:
        """The float32 tensors that they decode to."""
        return {name: outcome.dense() for name, outcome in self.outcomes.items()} | dict(self.floats)


# -- tensors made under inference mode, for autograd -----------------------------------------------------------------


def plain_outcome(outcome: Outcome) -> Outcome:
    """A copy whose tensors autograd takes."""
    solution = outcome.solution
    copied = replace(solution, units=solution.units.clone(), grid=solution.grid.clone())
    signs, order = outcome.incoherence, outcome.order
    if signs is not None:
        signs = replace(signs, signs_in=signs.signs_in.clone(), signs_out=signs.signs_out.clone())
    return replace(outcome, solution=copied, incoherence=signs, order=None if order is None else order.clone())
