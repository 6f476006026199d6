"""Tiny models of every family and one run of their sub-layers, for contracts that find their subjects by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.models import known_families
from compress.models.forward import Routing, Taps, embedded, final_norm, forward_block, forward_branch
from compress.models.forward import logits as scores
from compress.models.layers.moe import MoE
from compress.models.spec import Branch, ModelSpec

NAMES = sorted(known_families())
SMALL = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2}
ROUNDING = 1e-6
"""Relative, of models in float64 whose routing, like transformers', is computed in float32."""

Weights = dict[str, Tensor]
Families = Callable[[str], tuple[ModelSpec, Weights, Path]]
"""Spec, float64 weights and folder of a family's tiny model."""

Seen = dict[str, tuple[Tensor, Tensor | None]]
TOKENS = 24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def kinds(spec: ModelSpec) -> list[Branch]:
    """Every kind of sub-layer that the model has, once."""
    branches = (branch for layer in range(spec.layers) for branch in spec.branches(layer))
    return list({branch.sublayer: branch for branch in branches}.values())


def of(branch: Branch, weights: Mapping[str, Tensor]) -> Weights:
    """Its own."""
    return {t.name: weights[t.name] for t in branch.tensors}


def as_stored(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Weights:
    """The tensors that transformers reads: stacks of those that it knows stacked only."""
    out, stacks = {}, {}  # type: ignore[var-annotated]
    for t in spec.tensors():
        if t.declared.stacked:
            where = t.declared.slices[0]
            whole = stacks.setdefault(t.name.removesuffix(t.declared.name) + where.name, {})
            whole.setdefault(where.index, []).append((where, weights[t.name]))
        else:
            out[t.name] = weights[t.name]
    for name, entries in stacks.items():
        whole = []
        for _, parts in sorted(entries.items()):
            rows = torch.empty(sum(len(w) for _, w in parts), *parts[0][1].shape[1:], dtype=parts[0][1].dtype)
            for where, w in parts:
                rows[where.start : where.stop : where.step] = w
            whole.append(rows.T.contiguous() if parts[0][0].transposed else rows)
        out[name] = torch.stack(whole)
    return out


def logits(spec: ModelSpec, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    hidden = embedded(spec, weights[spec.embeddings], ids)
    for layer in range(spec.layers):
        hidden = forward_block(spec, layer, weights, hidden)
    return scores(spec, weights[spec.head], final_norm(spec, weights[spec.final_norm], hidden))


def everywhere(branch: Branch) -> Routing | None:
    """A routing that reaches every expert, None where there are none."""
    if not isinstance(branch.sublayer, MoE):
        return None
    k = branch.sublayer.router.k
    experts = torch.arange(TOKENS * k).reshape(TOKENS, k) % branch.sublayer.experts
    return Routing(experts, torch.softmax(randn(TOKENS, k), -1))


def hidden_states(branch: Branch) -> Tensor:
    """Always the same, [2, 12, hidden]."""
    return randn(2, TOKENS // 2, branch.spec.hidden_size, seed=1)


def run(
    branch: Branch, weights: Mapping[str, Tensor], until: int | None = None, *, chosen: bool = False
) -> tuple[Seen, Tensor | None]:
    """Inputs of a sub-layer and its output; its hidden states reach every expert, or those that are chosen."""
    seen: Seen = {}

    def note(key: str, x: Tensor, gate: Tensor | None) -> None:
        assert key not in seen and x.dim() == 2
        seen[key] = (x, gate)

    with torch.no_grad():
        routing = None if chosen else everywhere(branch)
        return seen, forward_branch(branch, weights, hidden_states(branch), Taps(note, until, routing))
