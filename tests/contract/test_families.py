"""What every family of `known_families()` must hold, on a tiny random model of it; a new file is tested without being listed.

The oracles are the checkpoint that transformers writes, transformers' own logits, and effects: what a declaration says of a
tensor is done to it, and the model computes what it did, or what the declaration says it then must.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.containers.gguf import _restored, _rows, piece_shape
from compress.models import known_families, load_spec
from compress.models.forward import Routing, Taps, final_norm, forward_block, forward_branch
from compress.models.layers.moe import MoE
from compress.models.spec import Branch, ModelSpec, TensorSpec
from compress.transforms.base import apply, folds
from compress.weights import Packed
from tests.tiny import FAMILIES, tiny_config, tiny_model

NAMES = sorted(known_families())
SMALL = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2}
ROUNDING = 1e-6
"""Relative, of models in float64 whose routing, like transformers', is computed in float32."""

IDS = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(0))
Weights = dict[str, Tensor]
Family = tuple[ModelSpec, Weights, Path]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Spec, float64 weights and folder of a family's tiny model."""

    @cache
    def make(name: str) -> Family:
        folder = tiny_model(name, tmp_path_factory.mktemp(name), tokenizer=False, **SMALL)
        spec = load_spec(json.loads((folder / "config.json").read_text()))
        return spec, {n: w.double() for n, w in load_file(folder / "model.safetensors").items()}, folder

    return make


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _kinds(spec: ModelSpec) -> list[Branch]:
    """Every kind of sub-layer that the model has, once."""
    branches = (branch for layer in range(spec.layers) for branch in spec.branches(layer))
    return list({branch.sublayer: branch for branch in branches}.values())


def _of(branch: Branch, weights: Mapping[str, Tensor]) -> Weights:
    return {t.name: weights[t.name] for t in branch.tensors}


def _logits(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Tensor:
    hidden = weights[spec.embeddings][IDS]
    for layer in range(spec.layers):
        hidden = forward_block(spec, layer, weights, hidden)
    return final_norm(spec, weights[spec.final_norm], hidden) @ weights[spec.head].T


def _everywhere(branch: Branch, tokens: int) -> Routing | None:
    """A routing that reaches every expert, None where there are none."""
    if not isinstance(branch.sublayer, MoE):
        return None
    k = branch.sublayer.router.k
    experts = torch.arange(tokens * k).reshape(tokens, k) % branch.sublayer.experts
    return Routing(experts, torch.softmax(_randn(tokens, k), -1))


Seen = dict[str, tuple[Tensor, Tensor | None]]


def _run(
    branch: Branch, weights: Mapping[str, Tensor], until: int | None = None, *, chosen: bool = False
) -> tuple[Seen, Tensor | None]:
    """Inputs of a sub-layer and its output, for hidden states that are always the same and reach every expert, or those
    that are chosen."""
    seen: Seen = {}

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        assert key not in seen and x.dim() == 2
        seen[key] = (x, gate)

    hidden = _randn(2, 12, branch.spec.hidden_size, seed=1)
    with torch.no_grad():
        routing = None if chosen else _everywhere(branch, 24)
        return seen, forward_branch(branch, weights, hidden, Taps(note, until, routing))


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(NAMES)


# -- the whole model
@pytest.mark.parametrize("name", NAMES)
def test_declared_tensors_are_the_checkpoints(families: Callable[[str], Family], name: str) -> None:
    spec, _, folder = families(name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    declared = spec.tensors()
    assert {t.name: t.shape for t in declared} == saved and len(declared) == len(saved)
    tied = load_spec({**spec.config, "tie_word_embeddings": True})
    assert {t.name for t in tied.tensors()} == saved.keys() - {spec.head}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(families: Callable[[str], Family], name: str) -> None:
    from transformers import AutoModelForCausalLM

    spec, weights, folder = families(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(IDS).logits
        ours = _logits(spec, {n: w.float() for n, w in weights.items()})
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_any_turn_of_the_stream_keeps_the_logits(families: Callable[[str], Family], name: str) -> None:
    """What is declared to read the stream reads x Q, with its norm's weights in front; what writes to it writes y Q."""
    spec, weights, _ = families(name)
    turn = torch.linalg.qr(_randn(spec.hidden_size, spec.hidden_size)).Q
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
    assert all(_gap(turned[n], weights[n]) > 0.1 for n in (spec.embeddings, spec.head, spec.final_norm))
    assert _gap(_logits(spec, turned), _logits(spec, weights)) < ROUNDING


def _sibling(tensor: TensorSpec, name: str) -> str:
    """The full name of another tensor of the same block."""
    return tensor.name.removesuffix(tensor.declared.name) + name


# -- inputs
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_seen_as_declared(families: Callable[[str], Family], name: str) -> None:
    """All of them, none else, as wide as declared; `until` shows those of its stage and before, and ends there."""
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        known, own = branch.inputs, _of(branch, weights)
        seen, out = _run(branch, own)
        assert out is not None and {key: x.shape[1] for key, (x, _) in seen.items()} == {
            key: given.width for key, given in known.items()
        }
        assert {key for key, (_, gate) in seen.items() if gate is not None} == {
            key for key, given in known.items() if given.expert is not None
        }
        assert {given.stage for given in known.values()} == set(range(branch.sublayer.stages))
        for stage in range(branch.sublayer.stages):
            some, out = _run(branch, own, stage)
            assert out is None and some.keys() == {key for key, given in known.items() if given.stage <= stage}
            assert all(torch.equal(x, seen[key][0]) for key, (x, _) in some.items())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_a_stage_depend_on_earlier_linears_alone(families: Callable[[str], Family], name: str) -> None:
    """Solvers replace the weights of one stage after the other."""
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        own, stage_of = _of(branch, weights), {key: given.stage for key, given in branch.inputs.items()}
        seen, _ = _run(branch, own)
        for stage in range(branch.sublayer.stages):
            later = {t.name for t in branch.tensors if t.input is not None and stage_of[t.input] >= stage}
            other, _ = _run(branch, {n: -w if n in later else w for n, w in own.items()})
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
def test_weights_multiply_the_input_that_they_name(families: Callable[[str], Family], name: str) -> None:
    """So that those of one input share its statistics."""
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        for chosen in (False, True):  # routers have their say in one, every expert in the other
            with _Products() as products:
                seen, _ = _run(branch, _of(branch, weights), chosen=chosen)
            for t in branch.tensors:
                found = products.seen.get(weights[t.name].data_ptr(), [])
                if t.input in seen and (chosen or t.input != "router"):
                    (x,) = found
                    assert t.shape[1] == branch.inputs[t.input].width
                    assert torch.equal(x.reshape(-1, t.shape[1]), seen[t.input][0]), t.name
                else:
                    assert not found or t.role == "router", t.name


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_inputs_are_rows_of_them(families: Callable[[str], Family], name: str) -> None:
    """`part_of`, and the words that recipes and seeds know inputs by."""
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        seen, _ = _run(branch, _of(branch, weights))
        for key, given in branch.inputs.items():
            assert given.signs and given.place in ("attention.in", "attention.out", "ffn.in", "ffn.act")
            if given.part_of is not None:
                whole = {row.numpy().tobytes() for row in seen[given.part_of][0]}
                assert all(row.numpy().tobytes() in whole for row in seen[key][0]), key


# -- folds and updates
@pytest.mark.parametrize("name", NAMES)
def test_scales_may_be_folded_where_declared(families: Callable[[str], Family], name: str) -> None:
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        own = _of(branch, weights)
        _, before = _run(branch, own)
        found = folds(branch)
        assert {fold.input for fold in found} == {key for key, given in branch.inputs.items() if given.made_by}
        for seed, fold in enumerate(found):
            changed = apply(own, fold, torch.exp(_randn(fold.rows, seed=seed)))
            assert changed.keys() == set(fold.names) and not any(torch.equal(w, own[n]) for n, w in changed.items())
            _, after = _run(branch, own | changed)
            assert after is not None and before is not None and _gap(after, before) < ROUNDING, fold.input


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_alone_moves_the_stream_by_its_own_change(families: Callable[[str], Family], name: str) -> None:
    """W + dW adds dW x, times the routing weight of an expert, whose weights sum to one; without them nothing is added."""
    spec, weights, _ = families(name)
    for branch in _kinds(spec):
        own, hidden = _of(branch, weights), _randn(2, 12, spec.hidden_size, seed=1)
        writers = {t.name for t in branch.tensors if t.declared.alone or (t.declared.writes and len(t.shape) == 1)}
        if any(t.declared.alone for t in branch.tensors):
            _, out = _run(branch, {n: torch.zeros_like(w) if n in writers else w for n, w in own.items()})
            assert torch.equal(out, hidden)
        for t in branch.tensors:
            if not t.declared.alone:
                continue
            assert t.declared.writes and t.input is not None
            seen, before = _run(branch, own)
            change = _randn(*t.shape)
            _, after = _run(branch, own | {t.name: own[t.name] + change})
            (x, gate), expected = seen[t.input], torch.zeros(24, spec.hidden_size, dtype=torch.float64)
            rows = torch.arange(24)
            if t.expert is not None:
                routes: list[Routing] = []
                forward_branch(branch, own, hidden, Taps(on_route=routes.append))
                torch.testing.assert_close(routes[0].weights.sum(1).double(), torch.ones(24, dtype=torch.float64))
                rows = (_everywhere(branch, 24).experts == t.expert).nonzero()[:, 0]
                x = x * gate[:, None]
            expected[rows] = x @ change.T
            torch.testing.assert_close((after - before).flatten(0, 1), expected, rtol=1e-9, atol=1e-9)


# -- axes
@pytest.mark.parametrize("name", NAMES)
def test_half_of_an_axis_is_half_of_it_everywhere(families: Callable[[str], Family], name: str) -> None:
    """All tensors of an axis count the same parts, and after a random half went what is made is still what is read."""
    spec, _, _ = families(name)
    for branch in _kinds(spec):
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
def test_gguf_names_are_each_somebodys_own(families: Callable[[str], Family], name: str) -> None:
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
def test_pieces_hold_every_row_once_and_give_the_tensor_back(families: Callable[[str], Family], name: str) -> None:
    spec, weights, _ = families(name)
    kinds = [t for branch in _kinds(spec) for t in branch.tensors] + list(spec.outer)
    for t in kinds:
        values = weights[t.name].float()
        rows = [np.arange(t.shape[0]) if p.rows is None else p.rows.index(t.shape[0]) for p in t.pieces]
        assert sorted(np.concatenate(rows).tolist()) == list(range(t.shape[0])), t.name
        for piece in t.pieces:
            if piece.columns is not None:
                assert sorted(piece.columns.index(t.shape[1]).tolist()) == list(range(t.shape[1])), t.name
        packed = Packed("f32", t.shape, {"values": values})
        stored = [(p, _rows(packed, t, "f32", p).reshape(-1).view(np.float32)) for p in t.pieces]
        shaped = [(p, bits.reshape(piece_shape(t, p))) for p, bits in stored]
        torch.testing.assert_close(torch.from_numpy(_restored(shaped, t.shape)), values, rtol=1e-5, atol=1e-6)


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
