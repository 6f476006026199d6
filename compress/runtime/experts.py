"""Routed experts whose matrices stay packed, each its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.runtime.linear import PackedLinear


class PackedExperts(nn.ModuleList):
    """Stands in for transformers' fused experts (`Qwen2MoeExperts`, `Qwen3MoeExperts`, `MixtralExperts`, `NemotronHExperts`).

    `experts`: for every expert its matrices by name, PackedLinear or nn.Linear; `leaves`: these names, of gate, up and down, or of
    up and down alone. Submodules are `<expert>.<name>`, so
    that tensors keep their checkpoint names. Only experts that some token is routed to are decoded.
    """

    act_fn: Callable[[Tensor], Tensor]
    shared: PackedLinear | None

    def __init__(
        self, experts: Sequence[Mapping[str, nn.Module]], leaves: Sequence[str], activation: Callable[[Tensor], Tensor]
    ):
        super().__init__(nn.ModuleDict(matrices) for matrices in experts)
        self.num_experts, self.leaves = len(experts), tuple(leaves)
        # modules, but not members of the list
        object.__setattr__(self, "act_fn", activation)
        object.__setattr__(self, "shared", None)

    def share_inputs(self) -> None:
        """Call once the weights are there: where all gates and ups have the same input signs, transform inputs once."""
        readers = [matrix for expert in range(self.num_experts) for matrix in self._matrices(expert)[:-1]]
        turned = [m for m in readers if isinstance(m, PackedLinear) and m.setting.incoherence]
        same = len(turned) == len(readers) and all(torch.equal(m.signs_in, turned[0].signs_in) for m in turned)
        object.__setattr__(self, "shared", turned[0] if same else None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width]; top_k_index, top_k_weights [tokens, k] -> [tokens, width]."""
        out = torch.zeros_like(hidden_states)
        inputs = hidden_states if self.shared is None else self.shared.transform(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # a token without an expert
                continue
            token, place = torch.where(top_k_index == expert)
            x = inputs[token]
            *readers, down = self._matrices(expert)
            first, *rest = (self._read(matrix, x) for matrix in readers)
            hidden = self.act_fn(first)
            y = down(hidden * rest[0] if rest else hidden) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _matrices(self, expert: int) -> list[nn.Module]:
        """In the order of their names."""
        return [self.get_submodule(f"{expert}.{leaf}") for leaf in self.leaves]

    def _read(self, matrix: nn.Module, x: Tensor) -> Tensor:
        """The product of a gate or an up with what `forward` made of the hidden states."""
        if self.shared is None:
            return matrix(x)
        assert isinstance(matrix, PackedLinear)  # else nothing would be shared
        return matrix.project(x)
