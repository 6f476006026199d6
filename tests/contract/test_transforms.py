"""What every scaling of a block must hold, on every kind of sub-layer of every family; a new file is tested without being listed.

Scalings are the subclasses of `TransformOptions`; whether one searches (it then has `candidates`) or follows a formula is
seen from its module.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress.transforms
from compress.models.spec import Branch
from compress.statistics import Moments
from compress.transforms import options as declared
from compress.transforms.base import Fold, apply, folds, rounding_error
from compress.transforms.options import TransformOptions
from tests.contract.blocks import NAMES, ROUNDING, Families, Weights, gap, kinds, of, run

SHARED = {"__init__", "base", "options"}
MERGED = {"hadamard", "incoherence", "rotate"}
"""Files of the folder that are no scaling: what they share, and transforms of the whole model or of single tensors."""

SCALINGS = {
    cls.model_fields["name"].default: cls
    for cls in vars(declared).values()
    if inspect.isclass(cls) and issubclass(cls, TransformOptions) and cls is not TransformOptions
}
EVERY = [pytest.param(scaling, family, id=f"{scaling}-{family}") for scaling in SCALINGS for family in NAMES]


def _rounding(name: str, weight: Tensor, importance: Tensor) -> Tensor:
    """Four bits a row, all columns alike."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 7
    return (weight / step).round() * step


def _seen(x: Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], magnitudes=True)
    moments.add(x.float())
    return moments


def _folds(branch: Branch, weights: Weights) -> list[tuple[Fold, Tensor]]:
    """The folds of a sub-layer and what flows there; of routed experts' own the first alone."""
    seen, _ = run(branch, weights)
    experts = {key: given.expert for key, given in branch.inputs.items()}
    return [(fold, seen[fold.input][0]) for fold in folds(branch) if experts[fold.input] in (None, 0)]


def _search(scaling: str, fold: Fold, weights: Weights, x: Tensor) -> tuple[Tensor, float, float]:
    options = SCALINGS[scaling]()
    return options.implementation.search(fold, weights, _seen(x), _rounding, options)


def test_every_scaling_has_a_file_and_options() -> None:
    files = {path.stem for path in Path(compress.transforms.__path__[0]).glob("*.py")} - SHARED - MERGED
    assert files == set(SCALINGS)
    for name, cls in SCALINGS.items():
        module = cls().implementation
        assert module.__name__ == f"compress.transforms.{name}" and module.__doc__ and cls.__doc__
        own = [field for key, field in cls.model_fields.items() if key not in TransformOptions.model_fields]
        assert all(field.description for field in own)


@pytest.mark.parametrize(("scaling", "family"), EVERY)
def test_a_scaled_block_computes_the_same(families: Families, scaling: str, family: str) -> None:
    """With scales that were searched, of all folds together; they are positive, finite, and the same again."""
    spec, weights, _ = families(family)
    for branch in kinds(spec):
        own = of(branch, weights)
        _, before = run(branch, own)
        scaled, given = dict(own), {name: w.clone() for name, w in own.items()}
        for fold, x in _folds(branch, own):
            scale, *errors = _search(scaling, fold, scaled, x)
            again, *same = _search(scaling, fold, scaled, x)
            assert torch.equal(scale, again) and errors == same
            assert scale.shape == (fold.rows,) and torch.isfinite(scale).all() and scale.min() > 0
            scaled |= apply(scaled, fold, scale)
        _, after = run(branch, scaled)
        assert gap(after, before) < ROUNDING
        assert all(torch.equal(w, given[name]) for name, w in own.items()), "an input was modified"


@pytest.mark.parametrize(("scaling", "family"), EVERY)
def test_what_is_reported_is_the_rounding_error(families: Families, scaling: str, family: str) -> None:
    """Without a scale and with the one that is given; a search never makes it worse."""
    spec, weights, _ = families(family)
    for branch in kinds(spec):
        own = of(branch, weights)
        for fold, x in _folds(branch, own):
            scale, before, after = _search(scaling, fold, own, x)
            assert before == rounding_error(fold, own, torch.ones(fold.rows), _seen(x), _rounding)
            assert after == rounding_error(fold, own, scale, _seen(x), _rounding)
            if hasattr(SCALINGS[scaling]().implementation, "candidates"):
                assert after <= before


@pytest.mark.parametrize(
    "scaling", [name for name, cls in SCALINGS.items() if hasattr(cls().implementation, "candidates")]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_no_scale_at_all_is_a_candidate(families: Families, scaling: str, family: str) -> None:
    spec, weights, _ = families(family)
    for branch in kinds(spec):
        own = of(branch, weights)
        for fold, x in _folds(branch, own):

            def as_it_was(name: str, weight: Tensor, importance: Tensor, own: Weights = own) -> Tensor:
                return weight if torch.equal(weight, own[name][: len(weight)].float()) else weight + 1

            options = SCALINGS[scaling]()
            found = options.implementation.search(fold, own, _seen(x), as_it_was, options)
            assert torch.equal(found[0], torch.ones(fold.rows)) and found[1:] == (0.0, 0.0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_degenerate_inputs_leave_scales_that_can_be_folded(families: Families, scaling: str) -> None:
    """Silent channels, nothing but silence, a channel a million times as loud, a dead row and a dead column."""
    spec, weights, _ = families("llama")
    for branch in kinds(spec):
        own = {name: w.clone() for name, w in of(branch, weights).items()}
        for fold, x in _folds(branch, own):
            for name in fold.consumers:
                own[name][1], own[name][:, 2] = 0.0, 0.0
            some, loud = x.clone(), x.clone()
            some[:, ::3] = 0.0
            loud[:, 5] *= 1e6
            for inputs in (some, torch.zeros_like(x), loud, x[:1]):
                scale, _, after = _search(scaling, fold, own, inputs)
                assert after == after and after < float("inf")
                changed = apply(own, fold, scale)
                assert all(torch.isfinite(w.float()).all() for w in changed.values())
