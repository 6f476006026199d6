"""What every step that changes a model's shape must hold, on every family; a new step or family is tested without being listed.

Steps are the subclasses of `StructureOptions`. Where a family cannot do one, a line says why; where it can, the oracle is
transformers, which loads what is left and computes what we compute.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.containers import CONTAINERS, Options, WriteRequest
from compress.models import ModelSpec, TensorSpec, load_spec
from compress.streaming.activations import Activations
from compress.structured import options as declared
from compress.structured.options import StructureOptions
from compress.structured.restructure import Restructured, restructure
from compress.structured.shapes import Cuts, multiple_for, reduction_problems, widths_of
from tests.contract.blocks import NAMES, SMALL, Families, Weights, logits
from tests.integration.containers import fetcher, plan
from tests.tiny import tiny_config

STEPS = {
    re.sub(r"(?<=.)(?=[A-Z])", "_", name.removesuffix("Options")).lower(): cls
    for name, cls in vars(declared).items()
    if inspect.isclass(cls) and issubclass(cls, StructureOptions) and cls is not StructureOptions
}
HINTS = typing.get_type_hints(Cuts)
SLOTS = {
    name: next(slot for slot, hint in HINTS.items() if cls in typing.get_args(hint)) for name, cls in STEPS.items()
}
"""Which field of `Cuts` each step is."""

COUNTED: dict[str, Callable[[TensorSpec], bool]] = {
    "drop_layers": lambda tensor: tensor.layer is not None,
    "prune_experts": lambda tensor: tensor.expert is not None,
    "prune_structured": lambda tensor: (
        tensor.layer is not None and tensor.input is not None and tensor.role != "router"
    ),
}
"""What the ratio of a step is a share of."""

IDS = np.random.default_rng(3).integers(0, SMALL["vocab_size"], (6, 12))
EVERY = [pytest.param(step, family, id=f"{step}-{family}") for step in STEPS for family in NAMES]


def _problems(spec: ModelSpec, step: str, **options: Any) -> list[str]:
    return reduction_problems(spec, **{SLOTS[step]: STEPS[step](**options)})


POSSIBLE = [
    pytest.param(step, family, id=f"{step}-{family}")
    for step in STEPS
    for family in NAMES
    if not _problems(load_spec(tiny_config(family, **SMALL)), step)
]


def _carried_out(spec: ModelSpec, weights: Weights, step: str, folder: Path) -> Restructured:
    folder.mkdir()
    scratch = lambda name: Activations(folder / f"{name}.f32", (*IDS.shape, spec.hidden_size))  # noqa: E731
    return restructure(spec, Cuts(**{SLOTS[step]: STEPS[step]()}), weights.__getitem__, IDS, scratch)


def _step(spec: ModelSpec, step: str) -> float:
    """The least share by which what the ratio counts can differ."""
    if step == "prune_structured":
        return max(multiple_for(width, STEPS[step]()) / width for width in widths_of(spec).values())
    return 1 / (spec.layers if step == "drop_layers" else spec.experts)


def test_every_step_is_possible_for_dense_models_or_mixtures_and_says_what_it_counts() -> None:
    assert set(COUNTED) == set(STEPS) and len(set(SLOTS.values())) == len(STEPS)
    done = {(step, bool(load_spec(tiny_config(family)).experts)) for step, family in (p.values for p in POSSIBLE)}
    assert done >= {(step, True) for step in STEPS}
    assert done == {(step, experts) for step in STEPS for experts in (False, True)} - {("prune_experts", False)}


@pytest.mark.parametrize(("step", "family"), POSSIBLE)
def test_what_is_left_is_a_model(families: Families, step: str, family: str, tmp_path: Path) -> None:
    """transformers finds every tensor in its place and computes our logits; two runs agree; the ratio is met to a step."""
    from transformers import AutoModelForCausalLM

    spec, wide, folder = families(family)
    weights = {name: w.float() for name, w in wide.items()}
    result, again = (_carried_out(spec, weights, step, tmp_path / name) for name in ("first", "again"))
    left, view = result.spec, result.view
    tensors = {t.name: view.load(t.name, weights.__getitem__).contiguous() for t in left.tensors()}
    assert {name: tuple(w.shape) for name, w in tensors.items()} == {t.name: t.shape for t in left.tensors()}
    for name, w in tensors.items():
        assert torch.equal(w, again.view.load(name, weights.__getitem__)), name

    small = tmp_path / "small"
    lines = plan(left)
    CONTAINERS["safetensors"].write(
        WriteRequest(small, left, lines, fetcher(tensors, lines), folder, Options(dtype="f32"))
    )
    assert load_spec(json.loads((small / "config.json").read_text())).tensors() == left.tensors()
    model, found = AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs, ours = model.eval()(torch.from_numpy(IDS)).logits, logits(left, tensors, torch.from_numpy(IDS))
    assert torch.isfinite(theirs).all() and (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()

    def size(spec: ModelSpec) -> int:
        return sum(t.parameters for t in spec.tensors() if COUNTED[step](t))

    assert 1 - size(left) / size(spec) == pytest.approx(STEPS[step]().ratio, abs=_step(spec, step) / 2 + 1e-9)


@pytest.mark.parametrize("ratio", [None, 1e-6, 0.999])
@pytest.mark.parametrize(("step", "family"), EVERY)
def test_impossible_ratios_are_told_in_one_line_with_a_way_out(step: str, family: str, ratio: float | None) -> None:
    spec = load_spec(tiny_config(family, **SMALL))
    problems = _problems(spec, step, **({} if ratio is None else {"ratio": ratio}))
    if ratio is None and not problems:
        return
    (line,) = problems
    assert line.startswith(f"{step}: ") and "\n" not in line and len(line) < 250
    assert re.search(r"[;,] (use|give|keep|prune|leave) ", line), line


@pytest.mark.parametrize("step", STEPS)
def test_options_are_described(step: str) -> None:
    cls = STEPS[step]
    assert cls.__doc__ and cls() == cls(**cls().model_dump())
    assert all(field.description for field in cls.model_fields.values())
    assert isinstance(cls().ratio, float) and 0 < cls().ratio < 1
