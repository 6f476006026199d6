"""A linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.codecs.names import codec_info
from compress.containers.compress import Setting
from compress.runtime.weight import PackedWeight
from compress.transforms.incoherence import Incoherence, unpack_signs

_LEVELS = 127  # of an 8-bit activation, on either side of zero


class PackedLinear(PackedWeight):
    """`y = x W^T + bias` for a coded W of [out_features, in_features], in the dtype of x.

    With incoherence the Hadamard transforms are applied to x and y, never to W. With activations "int8" each token of
    what W multiplies (behind the transform) becomes `scale * round(x / scale)`, scale = max |x| / 127; where W is
    int8 with one scale a row the product is one of integers. Rounding has the gradient of the identity.
    """

    codes: Tensor
    scales: Tensor
    signs_in: Tensor
    signs_out: Tensor
    """Parts by these names: of intN codecs, and of incoherence."""
    bias: nn.Parameter | None

    def __init__(
        self, setting: Setting, shape: tuple[int, int], parts: Mapping[str, Tensor], bias: nn.Parameter | None = None
    ):
        super().__init__(setting, shape, parts)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.transform(x))

    def transform(self, x: Tensor) -> Tensor:
        """What the coded weight multiplies, [..., in_features]; linears with equal `signs_in` can share it."""
        return self._incoherence().input(x) if self.setting.incoherence else x

    def project(self, x: Tensor) -> Tensor:
        """Transformed activations [..., in_features] -> [..., out_features]."""
        flat = x.reshape(-1, self.in_features)
        y = self._rounded_product(flat) if self.setting.activations == "int8" else self.product(flat)
        if self.setting.incoherence:
            y = self._incoherence().output(y)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _incoherence(self) -> Incoherence:
        rows, columns = self.shape
        return Incoherence(unpack_signs(self.signs_in, columns), unpack_signs(self.signs_out, rows))

    # -- 8-bit activations -----------------------------------------------------------------------------------------
    def _rounded_product(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / _LEVELS
        codes = (x.detach().float() / scale).round().clamp(-_LEVELS, _LEVELS)
        if self._integer and not (torch.is_grad_enabled() and x.requires_grad):
            return (self._integer_product(codes.to(torch.int8)).float() * scale).to(x.dtype)
        rounded = (codes * scale).to(x.dtype)
        return self.product(x + (rounded - x).detach() if x.requires_grad else rounded)

    @property
    def _integer(self) -> bool:
        return codec_info(self.setting.codec).is_row_int8

    def _integer_product(self, codes: Tensor) -> Tensor:
        """int8 [tokens, in] -> float32 [tokens, out]: exact sums of integers, times the rows' scales."""
        out = torch.empty(len(codes), self.out_features, dtype=torch.float32, device=codes.device)
        for rows in self.chunks():
            weight = (self.codes[rows] ^ 128).view(torch.int8)  # the zero point is 128
            out[:, rows] = integer_matmul(codes, weight) * self.scales[rows].float().T
        return out


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [t, n] times the transpose of int8 [m, n] -> int32 [t, m], exact.

    On CUDA, where `torch._int_mm` wants more than 16 rows and multiples of 8, in float64 otherwise.
    """
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    if a.device.type == "cuda" and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        padded = nn.functional.pad(a, (0, 0, 0, max(0, 17 - len(a))))
        return torch._int_mm(padded, b.T)[: len(a)]
    return (a.double() @ b.double().T).to(torch.int32)
