"""Rotations merged into the weights (QuaRot, arXiv 2404.00456; R1 and R2 of SpinQuant, arXiv 2405.16406, section 3).

Let Q be orthogonal. A residual stream x Q instead of x has the same root mean square, so that a model whose norms carry
no weights of their own computes what it did when all that writes to the stream is multiplied with Q and all that reads
from it with Q^T (R1). The same holds for the channels of each value head between v_proj and o_proj (R2). Outlier
channels are thereby spread over all. Nothing is left to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.transforms.hadamard import hadamard_transform, random_signs
from compress.transforms.options import RotateOptions

if TYPE_CHECKING:
    from compress.models.spec import ModelSpec, TensorSpec

CHUNK = 1 << 24  # elements in float64 at a time: embeddings are large

EMBEDDINGS, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Rotation:
    """Randomised Hadamard rotations of one model.

    tensors: those of the rotated model, by name, which has a head of its own (`ModelSpec.untied`) because only the head
    takes the final norm; tied: whether the original's head is its embeddings; stream: float64 [hidden_size] signs of
    R1, or None; values: float64 [head_dim] signs of R2, one vector a layer, or none.
    """

    tensors: Mapping[str, TensorSpec] = field(repr=False)
    tied: bool
    head_dim: int
    stream: Tensor | None
    values: tuple[Tensor, ...]

    @classmethod
    def draw(cls, spec: ModelSpec, options: RotateOptions) -> Rotation:
        """Rotations of the model `spec` (as its checkpoint is, tied or not); the same for ever for the same seed."""
        tensors = {t.name: t for t in spec.untied().tensors()}
        r1, r2 = "R1" in options.kinds, "R2" in options.kinds
        stream = random_signs(spec.hidden_size, f"R1 {options.seed}").double() if r1 else None
        layers = range(spec.layers if r2 else 0)
        values = tuple(random_signs(spec.head_dim, f"R2 {options.seed} {n}").double() for n in layers)
        return cls(tensors, spec.tied, spec.head_dim, stream, values)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that `tensor(name)` loads, itself first; none for a norm that becomes ones.

        Raises KeyError for a name that the rotated model does not have.
        """
        if self._is_folded(self.tensors[name]):
            return ()
        own = EMBEDDINGS if name == HEAD and self.tied else name
        norm = self._norm_before(self.tensors[name])
        return (own,) if norm is None else (own, norm)

    def tensor(self, name: str, load: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the rotated model from the original's, which `load(name)` gives.

        Computed in float64; float32 comes back, float64 where it came in. Tensors that no rotation touches come back
        as they were loaded. All stays on the device of what was loaded; a norm that becomes ones, for which nothing is, is
        on the CPU. Raises KeyError for a name that the rotated model does not have.
        """
        spec = self.tensors[name]
        if self._is_folded(spec):
            return torch.ones(spec.shape)
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
                part = part * norm.double()
            for dim, signs in turns:
                part = _turn(part, signs.to(part.device), dim)
            out[start : start + rows] = part
        return out

    def _turns(self, tensor: TensorSpec) -> list[tuple[int, Tensor]]:
        """(dimension, signs) of every rotation that reaches a tensor."""
        turns = []
        if self.stream is not None:
            if tensor.role in ("embeddings", "lm_head") or _reads_stream(tensor):
                turns.append((-1, self.stream))
            elif _writes_stream(tensor):
                turns.append((0, self.stream))
        if self.values and tensor.layer is not None:
            if ".self_attn.v_proj." in tensor.name:
                turns.append((0, self.values[tensor.layer]))
            elif tensor.role == "attention.o":
                turns.append((-1, self.values[tensor.layer]))
        return turns

    def _is_folded(self, tensor: TensorSpec) -> bool:
        """Norms of the residual stream; those of queries and keys see no rotation."""
        return self.stream is not None and tensor.role == "norms" and ".self_attn." not in tensor.name

    def _norm_before(self, tensor: TensorSpec) -> str | None:
        if self.stream is None:
            return None
        if tensor.role == "lm_head":
            return FINAL_NORM
        if not _reads_stream(tensor):
            return None
        leaf = "input_layernorm" if tensor.half == "attention" else "post_attention_layernorm"
        return f"model.layers.{tensor.layer}.{leaf}.weight"


def _reads_stream(tensor: TensorSpec) -> bool:
    return tensor.layer is not None and tensor.input is not None and tensor.input.endswith((".in", "router"))


def _writes_stream(tensor: TensorSpec) -> bool:
    """o_proj and every down_proj, or their bias."""
    if tensor.role == "biases":
        return tensor.name.endswith((".o_proj.bias", ".down_proj.bias"))
    return tensor.input is not None and tensor.input.endswith((".out", ".act"))


def _turn(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    """H diag(signs) along `dim`, whose length is a multiple of the signs' (head after head)."""
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, len(signs)))
    return hadamard_transform(blocks * signs).flatten(-2).movedim(-1, dim)
