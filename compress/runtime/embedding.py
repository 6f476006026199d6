"""Embeddings that stay packed, and the head that shares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compress.containers.compress import Setting
from compress.runtime.weight import PackedWeight


class PackedEmbedding(PackedWeight):
    """A coded table of [tokens, width]; rows are decoded when they are looked up, in `dtype`, and multiplied by `scale`."""

    def __init__(
        self,
        setting: Setting,
        shape: tuple[int, int],
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        scale: float = 1.0,
    ):
        super().__init__(setting, shape, parts)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = shape
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        values, scale = self.decoded(tokens.reshape(-1), torch.float32)
        values = values if scale is None else values * scale
        rows = values.to(self.dtype).reshape(*tokens.shape, self.embedding_dim)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class TiedHead(nn.Module):
    """The head of a model whose embeddings are packed: it multiplies by the same parts and owns none."""

    embedding: PackedEmbedding
    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = embedding.shape
        # not a submodule: the parts are saved and moved once, with the embeddings
        object.__setattr__(self, "embedding", embedding)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding.product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, shares the embeddings"
