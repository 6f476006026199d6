"""What every family of `known_families()` must hold, on a tiny random model of it; a new file is tested without being listed.

The oracles are the checkpoint that transformers writes, transformers' own logits, and effects: what a declaration says of a
tensor is done to it, and the model computes what it did, or what the declaration says it then must.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.containers.gguf import _rows
from compress.models import load_spec
from compress.models.forward import Routing, Taps, forward_branch
from compress.models.gguf.tensors import piece_shape, restored
from compress.models.layers.moe import MoE
from compress.models.spec import TensorSpec
from compress.transforms.base import apply, folds
from compress.weights import Packed
from tests.contract.blocks import (
    NAMES,
    ROUNDING,
    SMALL,
    TOKENS,
    Families,
    everywhere,
    gap,
    hidden_states,
    kinds,
    logits,
    of,
    randn,
    run,
)  # fmt: skip
from tests.proofs import proved
from tests.tiny import FAMILIES, tiny_config

IDS = torch.randint(0, SMALL["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(NAMES)


# -- the whole model
@pytest.mark.parametrize("name", NAMES)
def test_declared_tensors_are_the_checkpoints(families: Families, name: str) -> None:
    """As they are, or, where transformers stacks or fuses them, every number of those once."""
    spec, weights, folder = families(name)
    saved, declared = load_file(folder / "model.safetensors"), spec.tensors()
    assert len({t.name for t in declared}) == len(declared)
    parts: dict[str, list[Tensor]] = {}
    for t in declared:
        if t.declared.stacked:
            parts.setdefault(t.name.removesuffix(t.declared.name) + t.declared.slices[0].name, []).append(
                weights[t.name]
            )
        assert t.name in saved or t.declared.stacked
    for whole, found in parts.items():
        numbers, stored = torch.cat([part.flatten() for part in found]), saved.pop(whole).double().flatten()
        assert torch.equal(numbers.sort().values, stored.sort().values), whole
        assert len(stored.unique()) > 0.999 * len(stored)  # so that few are mistaken for each other
    assert {t.name: t.shape for t in declared if not t.declared.stacked} == {
        n: tuple(w.shape) for n, w in saved.items()
    }
    assert all(weights[t.name].shape == t.shape for t in declared)
    tied = load_spec({**spec.config, "tie_word_embeddings": True})
    assert {t.name for t in tied.tensors()} == {t.name for t in declared} - {spec.untied().head}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(families: Families, name: str) -> None:
    from transformers import AutoModelForCausalLM

    spec, weights, folder = families(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(IDS).logits
        ours = logits(spec, {n: w.float() for n, w in weights.items()}, IDS)
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    assert theirs.std() > 0.1 and gap <= 1e-4
    proved(name, "logits", gap=gap)


@pytest.mark.parametrize("name", NAMES)
def test_any_turn_of_the_stream_keeps_the_logits(families: Families, name: str) -> None:
    """What is declared to read the stream reads x Q, with its norm's weights in front; what writes to it writes y Q. Where the
    stream is declared to be fixed, that would be another model."""
    spec, weights, _ = families(name)
    turn = torch.linalg.qr(randn(spec.hidden_size, spec.hidden_size)).Q
    turned = {}
    for t in spec.tensors():
        w, declared = weights[t.name], t.declared
        if declared.stream_norm:
            w = torch.ones_like(w) - declared.shift
        elif declared.reads is not None:
            norm = spec.by_name[_sibling(t, declared.reads)]
            w = (w * (weights[norm.name] + norm.declared.shift)) @ turn
        elif t.role == "embeddings":
            w = w @ turn
        elif declared.writes:
            w = (turn.T @ w.reshape(len(w), -1)).reshape(w.shape)
        turned[t.name] = w
    assert all(gap(turned[n], weights[n]) > 0.1 for n in (spec.embeddings, spec.head, spec.final_norm))
    changed = gap(logits(spec, turned, IDS), logits(spec, weights, IDS))
    assert changed > 1e-3 if spec.fixed_stream else changed < ROUNDING


def _sibling(tensor: TensorSpec, name: str) -> str:
    """The full name of another tensor of the same block."""
    return tensor.name.removesuffix(tensor.declared.name) + name


# -- inputs
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_seen_as_declared(families: Families, name: str) -> None:
    """All of them, none else, as wide as declared; `until` shows those of its stage and before, and ends there."""
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        known, own = branch.inputs, of(branch, weights)
        seen, out = run(branch, own)
        assert out is not None and {key: x.shape[1] for key, (x, _) in seen.items()} == {
            key: given.width for key, given in known.items()
        }
        assert {key for key, (_, gate) in seen.items() if gate is not None} == {
            key for key, given in known.items() if given.expert is not None
        }
        assert {given.stage for given in known.values()} == set(range(branch.sublayer.stages))
        for stage in range(branch.sublayer.stages):
            some, out = run(branch, own, stage)
            assert out is None and some.keys() == {key for key, given in known.items() if given.stage <= stage}
            assert all(torch.equal(x, seen[key][0]) for key, (x, _) in some.items())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_a_stage_depend_on_earlier_linears_alone(families: Families, name: str) -> None:
    """Solvers replace the weights of one stage after the other."""
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        own, stage_of = of(branch, weights), {key: given.stage for key, given in branch.inputs.items()}
        seen, _ = run(branch, own)
        for stage in range(branch.sublayer.stages):
            later = {t.name for t in branch.tensors if t.input is not None and stage_of[t.input] >= stage}
            other, _ = run(branch, {n: -w if n in later else w for n, w in own.items()})
            for key, (x, _) in other.items():
                if stage_of[key] <= stage:
                    assert torch.equal(x, seen[key][0]), f"{key} depends on what is solved at its stage"


class _Products(TorchFunctionMode):
    """What every matrix is multiplied with, by the matrix's address."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            self.seen.setdefault(args[1].data_ptr(), []).append(args[0].detach())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_weights_multiply_the_input_that_they_name(families: Families, name: str) -> None:
    """So that those of one input share its statistics."""
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        for chosen in (False, True):  # routers have their say in one, every expert in the other
            with _Products() as products:
                seen, _ = run(branch, of(branch, weights), chosen=chosen)
            for t in branch.tensors:
                found = products.seen.get(weights[t.name].data_ptr(), [])
                if t.input in seen and (chosen or t.input != "router"):
                    (x,) = found
                    assert t.shape[1] == branch.inputs[t.input].width
                    assert torch.equal(x.reshape(-1, t.shape[1]), seen[t.input][0]), t.name
                else:
                    assert not found or t.role == "router", t.name


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_inputs_are_rows_of_them(families: Families, name: str) -> None:
    """`part_of`, and the words that recipes and seeds know inputs by."""
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        seen, _ = run(branch, of(branch, weights))
        for key, given in branch.inputs.items():
            assert given.signs and given.place in ("attention.in", "attention.out", "ffn.in", "ffn.act")
            if given.part_of is not None:
                whole = {row.numpy().tobytes() for row in seen[given.part_of][0]}
                assert all(row.numpy().tobytes() in whole for row in seen[key][0]), key


# -- folds and updates
@pytest.mark.parametrize("name", NAMES)
def test_scales_may_be_folded_where_declared(families: Families, name: str) -> None:
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        own = of(branch, weights)
        _, before = run(branch, own)
        found = folds(branch)
        assert {fold.input for fold in found} == {key for key, given in branch.inputs.items() if given.made_by}
        for seed, fold in enumerate(found):
            changed = apply(own, fold, torch.exp(randn(fold.rows, seed=seed)))
            assert changed.keys() == set(fold.names) and not any(torch.equal(w, own[n]) for n, w in changed.items())
            _, after = run(branch, own | changed)
            assert after is not None and before is not None and gap(after, before) < ROUNDING, fold.input


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_alone_moves_the_stream_by_its_own_change(families: Families, name: str) -> None:
    """W + dW adds dW x, times the sub-layer's factor and the routing weight of an expert, whose weights sum to one; without
    them nothing is added."""
    spec, weights, _ = families(name)
    for branch in kinds(spec):
        own, hidden = of(branch, weights), hidden_states(branch)
        writers = {t.name for t in branch.tensors if t.declared.alone or (t.declared.writes and len(t.shape) == 1)}
        if any(t.declared.alone for t in branch.tensors):
            _, out = run(branch, {n: torch.zeros_like(w) if n in writers else w for n, w in own.items()})
            assert torch.equal(out, hidden)
        for t in branch.tensors:
            if not t.declared.alone:
                continue
            assert t.declared.writes and t.input is not None
            seen, before = run(branch, own)
            change = randn(*t.shape)
            _, after = run(branch, own | {t.name: own[t.name] + change})
            (x, gate), expected = seen[t.input], torch.zeros(TOKENS, spec.hidden_size, dtype=torch.float64)
            rows = torch.arange(TOKENS)
            if t.expert is not None:
                routes: list[Routing] = []
                forward_branch(branch, own, hidden, Taps(on_route=routes.append))
                torch.testing.assert_close(routes[0].weights.sum(1).double(), torch.ones(TOKENS, dtype=torch.float64))
                rows = (everywhere(branch).experts == t.expert).nonzero()[:, 0]
                x = x * gate[:, None]
            expected[rows] = x @ change.T * branch.sublayer.residual
            torch.testing.assert_close((after - before).flatten(0, 1), expected, rtol=1e-9, atol=1e-9)


# -- axes
@pytest.mark.parametrize("name", NAMES)
def test_half_of_an_axis_is_half_of_it_everywhere(families: Families, name: str) -> None:
    """All tensors of an axis count the same parts, and after a random half went what is made is still what is read."""
    spec, _, _ = families(name)
    for branch in kinds(spec):
        axes = {
            (t.name, dim): axis for t in branch.tensors for dim, axis in enumerate(t.declared.axes) if axis is not None
        }
        counts: dict[str, set[float]] = {}
        for (tensor, dim), axis in axes.items():
            counts.setdefault(axis.of, set()).add(spec.by_name[tensor].shape[dim] / axis.run)
        assert all(len(found) == 1 and found.pop().is_integer() for found in (set(c) for c in counts.values()))
        random = torch.Generator().manual_seed(0)
        kept = {of: torch.randperm(int(*count), generator=random)[: int(*count) // 2] for of, count in counts.items()}

        def size(tensor: str, dim: int, axes: Mapping = axes, kept: Mapping = kept) -> int:
            axis = axes.get((tensor, dim))
            return spec.by_name[tensor].shape[dim] if axis is None else len(kept[axis.of]) * axis.run

        for key, given in branch.inputs.items():
            widths = {size(t.name, 1) for t in branch.tensors if t.input == key}
            made = {size(branch.root + maker, 0) * given.heads for maker in given.made_by}
            assert len(widths) <= 1 and len(widths | made) <= 1, key
        if isinstance(branch.sublayer, MoE):
            assert counts["experts"] == {branch.sublayer.experts}


# -- GGUF
@pytest.mark.parametrize("name", NAMES)
def test_gguf_names_are_each_somebodys_own(families: Families, name: str) -> None:
    """But for a layer's experts, which are stacked in their order. ggml knows no name of more than 63 characters."""
    spec, _, _ = families(name)
    found: dict[str, list[int | None]] = {}
    for t in spec.tensors():
        for piece in t.pieces:
            found.setdefault(piece.name, []).append(t.expert)
            assert piece.name.startswith(f"blk.{t.layer}.") == (t.layer is not None)
    for piece, experts in found.items():
        assert len(piece) < 64 and experts in ([None], list(range(spec.experts))), piece


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_every_row_once_and_give_the_tensor_back(families: Families, name: str) -> None:
    spec, weights, _ = families(name)
    different = [t for branch in kinds(spec) for t in branch.tensors] + list(spec.outer)
    for t in different:
        values = weights[t.name].float()
        rows = [np.arange(t.shape[0]) if p.rows is None else p.rows.index(t.shape[0]) for p in t.pieces]
        assert sorted(np.concatenate(rows).tolist()) == list(range(t.shape[0])), t.name
        for piece in t.pieces:
            if piece.columns is not None:
                assert sorted(piece.columns.index(t.shape[1]).tolist()) == list(range(t.shape[1])), t.name
        packed = Packed("f32", t.shape, {"values": values})
        stored = [(p, _rows(packed, t, "f32", p).reshape(-1).view(np.float32)) for p in t.pieces]
        shaped = [(p, bits.reshape(piece_shape(t, p))) for p, bits in stored]
        torch.testing.assert_close(torch.from_numpy(restored(shaped, t.shape)), values, rtol=1e-5, atol=1e-6)


# -- from config.json alone
def test_specs_need_no_torch() -> None:
    configs = json.dumps([tiny_config(name) for name in NAMES])
    code = (
        "import json, sys\n"
        "from compress.models import load_spec\n"
        "for config in json.load(sys.stdin):\n"
        "    spec = load_spec(config)\n"
        "    assert spec.tensors() and all(t.pieces for t in spec.tensors())\n"
        "    assert {g for block in spec.blocks for s in block for g in s.gguf_keys()}\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], input=configs, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
