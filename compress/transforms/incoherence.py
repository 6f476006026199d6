"""Incoherence processing: a weight between two randomised Hadamard transforms (QuIP#, arXiv 2402.04396, section 3).

Random signs and a Hadamard transform on either side make the entries of any weight roughly Gaussian and of one size,
which is what lattice and trellis codebooks are made for. Both sides are orthonormal: errors keep their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.transforms.hadamard import hadamard_transform, inverse_hadamard_transform, random_signs


@dataclass(frozen=True)
class Incoherence:
    """The two transforms of a weight [m, n]: `U = H_m diag(signs_out)` and `V = H_n diag(signs_in)`.

    signs_in: float32 [n] of +-1; signs_out: float32 [m] of +-1.
    """

    signs_in: Tensor
    signs_out: Tensor

    @classmethod
    def draw(cls, m: int, n: int, seed_in: int, seed_out: int, *, device: torch.device | None = None) -> Incoherence:
        """Random signs for a weight [m, n] on `device` (default: the CPU); the same seeds give the same signs on every
        machine, device and version."""
        signs_in, signs_out = random_signs(n, f"signs {seed_in}"), random_signs(m, f"signs {seed_out}")
        return cls(signs_in.to(device), signs_out.to(device))

    def weight(self, weight: Tensor) -> Tensor:
        """W [m, n] -> U W V^T, same dtype."""
        turned = hadamard_transform(weight * self._signs(self.signs_in, weight), 1)
        return hadamard_transform(turned * self._signs(self.signs_out, weight)[:, None], 0)

    def gram(self, gram: Tensor) -> Tensor:
        """Second moments of the inputs, [n, n] -> V G V^T in the gram's dtype."""
        signs = self._signs(self.signs_in, gram)
        return hadamard_transform(hadamard_transform(gram * signs * signs[:, None], 1), 0)

    def restore(self, weight: Tensor) -> Tensor:
        """U^T W' V, the inverse of `weight`."""
        turned = inverse_hadamard_transform(inverse_hadamard_transform(weight, 1), 0)
        return turned * self._signs(self.signs_in, weight) * self._signs(self.signs_out, weight)[:, None]

    def input(self, x: Tensor) -> Tensor:
        """Activations x [..., n] -> V x, what W' multiplies."""
        return hadamard_transform(x * self._signs(self.signs_in, x))

    def output(self, y: Tensor) -> Tensor:
        """W' V x [..., m] -> U^T W' V x: with the W' of `weight`, what W would have given for x."""
        return inverse_hadamard_transform(y) * self._signs(self.signs_out, y)

    @staticmethod
    def _signs(signs: Tensor, like: Tensor) -> Tensor:
        return signs.to(like.device, like.dtype)


def pack_signs(signs: Tensor) -> Tensor:
    """float [n] of +-1 -> uint8 [ceil(n / 8)]; bit i % 8 of byte i // 8 is set where signs[i] is negative."""
    bits = torch.zeros(-(-len(signs) // 8) * 8, dtype=torch.uint8, device=signs.device)
    bits[: len(signs)] = signs < 0
    return (bits.reshape(-1, 8) << _shifts(signs.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> float32 [n] of +-1. Raises ValueError when the bytes are not those of n signs."""
    if packed.numel() != -(-n // 8):
        raise ValueError(f"{packed.numel()} bytes of signs for {n} of them")
    bits = packed[:, None] >> _shifts(packed.device) & 1
    return 1.0 - 2.0 * bits.flatten()[:n].float()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
