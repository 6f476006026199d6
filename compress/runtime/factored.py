"""A linear layer whose weight stays two factors: it multiplies by the dictionary, then by the coefficients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.codecs.factors import split
from compress.containers.compress import Setting
from compress.runtime.weight import PackedWeight


class FactoredLinear(nn.Module):
    """`y = (x D^T) C^T + bias`, D [k, in_features] and C [out_features, k] in codecs of their own.

    parts: `dictionary.<part>` and `coefficients.<part>`, possibly on the meta device; W itself is never formed.
    """

    bias: nn.Parameter | None

    def __init__(
        self, setting: Setting, shape: tuple[int, int], parts: Mapping[str, Tensor], bias: nn.Parameter | None = None
    ):
        super().__init__()
        self.setting = setting
        self.out_features, self.in_features = shape
        dictionary, coefficients = split(setting.codec, shape, parts)
        atoms = dictionary.shape[0]
        self.dictionary = PackedWeight(Setting(dictionary.codec), (atoms, self.in_features), dictionary.parts)
        self.coefficients = PackedWeight(Setting(coefficients.codec), (self.out_features, atoms), coefficients.parts)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = self.coefficients.product(self.dictionary.product(x.reshape(-1, self.in_features)))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.setting.codec}"
