"""Rotations merged into the weights (QuaRot, arXiv 2404.00456; R1 and R2 of SpinQuant, arXiv 2405.16406, section 3).

Let Q be orthogonal. A residual stream x Q instead of x has the same root mean square, so that a model whose norms carry
no weights of their own computes what it did when all that writes to the stream is multiplied with Q and all that reads
from it with Q^T (R1). The same holds for the channels of each value head between v_proj and o_proj (R2). Outlier
channels are thereby spread over all. Nothing is left to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.transforms.hadamard import hadamard_transform, random_signs
from compress.transforms.options import RotateOptions

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec, TensorSpec

CHUNK = 1 << 24  # elements in float64 at a time: embeddings are large


@dataclass(frozen=True)
class Rotation:
    """Randomised Hadamard rotations of one model.

    spec: the rotated model, which has a head of its own (`ModelSpec.untied`) because only the head takes the final norm;
    tied: whether the original's head is its embeddings; stream: float64 [hidden_size] signs of R1, or None; values:
    float64 [head_dim] signs of R2, one vector a layer, or none.
    """

    spec: ModelSpec = field(repr=False)
    tied: bool
    stream: Tensor | None
    values: tuple[Tensor, ...]

    @classmethod
    def draw(cls, spec: ModelSpec, options: RotateOptions) -> Rotation:
        """Rotations of the model `spec` (as its checkpoint is, tied or not); the same for ever for the same seed."""
        r1, r2 = "R1" in options.kinds, "R2" in options.kinds
        stream = random_signs(spec.hidden_size, f"R1 {options.seed}").double() if r1 else None
        layers = range(spec.layers if r2 else 0)
        values = tuple(random_signs(_head_dim(spec, n), f"R2 {options.seed} {n}").double() for n in layers)
        return cls(spec.untied(), spec.tied, stream, values)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that `tensor(name)` loads, itself first; none for a norm that becomes ones.

        Raises KeyError for a name that the rotated model does not have.
        """
        if self._is_folded(self.spec.by_name[name]):
            return ()
        own = self.spec.embeddings if name == self.spec.head and self.tied else name
        norm = self._norm_before(self.spec.by_name[name])
        return (own,) if norm is None else (own, norm.name)

    def tensor(self, name: str, load: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the rotated model from the original's, which `load(name)` gives.

        Computed in float64; float32 comes back, float64 where it came in. Tensors that no rotation touches come back
        as they were loaded. All stays on the device of what was loaded; a norm that becomes ones, for which nothing is, is
        on the CPU. Raises KeyError for a name that the rotated model does not have.
        """
        spec = self.spec.by_name[name]
        if self._is_folded(spec):
            return torch.full(spec.shape, 1.0 - spec.declared.shift)
        before = self._norm_before(spec)
        shift = 0.0 if before is None else before.declared.shift
        own, *norms = (load(source) for source in self.sources(name))
        turns = self._turns(spec)
        if not turns:
            return own
        dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
        out = torch.empty(own.shape, dtype=dtype, device=own.device)
        # only embeddings and heads are large, and their rows do not mix
        rows = len(own) if any(dim == 0 for dim, _ in turns) else max(1, CHUNK // own.shape[1])
        for start in range(0, len(own), rows):
            part = own[start : start + rows].double()
            for norm in norms:
                part = part * (norm.double() + shift)
            for dim, signs in turns:
                part = _turn(part, signs.to(part.device), dim)
            out[start : start + rows] = part
        return out

    def _turns(self, tensor: TensorSpec) -> list[tuple[int, Tensor]]:
        """(dimension, signs) of every rotation that reaches a tensor."""
        turns, declared = [], tensor.declared
        if self.stream is not None:
            if tensor.role == "embeddings" or declared.reads:
                turns.append((-1, self.stream))
            elif declared.writes:
                turns.append((0, self.stream))
        if self.values and tensor.layer is not None and declared.values is not None:
            turns.append((declared.values, self.values[tensor.layer]))
        return turns

    def _is_folded(self, tensor: TensorSpec) -> bool:
        """Norms of the residual stream; those of queries and keys see no rotation."""
        return self.stream is not None and tensor.declared.stream_norm

    def _norm_before(self, tensor: TensorSpec) -> TensorSpec | None:
        if self.stream is None or tensor.declared.reads is None:
            return None
        if tensor.layer is None:
            return self.spec.by_name[tensor.declared.reads]
        return self.spec.by_name[self.spec.branches(tensor.layer)[tensor.part].root + tensor.declared.reads]


def _head_dim(spec: ModelSpec, layer: int) -> int:
    """Of a block's value heads."""
    return next((dim for s in spec.blocks[layer] if (dim := getattr(s, "head_dim", 0))), spec.head_dim)


def _turn(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    """H diag(signs) along `dim`, whose length is a multiple of the signs' (head after head)."""
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, len(signs)))
    return hadamard_transform(blocks * signs).flatten(-2).movedim(-1, dim)
