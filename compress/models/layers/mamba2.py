"""The selective state space of Mamba-2 (SSD, arXiv 2405.21060). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from compress.models.layers.base import GgufValue, Input, Past, Sublayer, Weight, linear
from compress.models.layers.views import Map, Piece

LEAST = 0.001
"""Time steps shorter than that leave a state as it was, whether they are lengthened to it or not: one that no engine but
transformers does."""


@dataclass(frozen=True)
class Mamba2(Sublayer):
    """out_proj(norm(y * silu(z))), y what `heads` decaying states of [head_dim, state] give.

    in_proj's rows are z, x, B, C and dt; a causal convolution with silu goes over x, B and C. `groups` of heads share B and C.
    kernel: tokens that the convolution spans; eps: of the norm behind the gate, which takes the root mean square of each of
    `norm_groups` runs of channels; limits: of dt behind its softplus; bias: on both projections; conv_bias: on the convolution;
    prefix: of its tensors in the block.
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    eps: float
    norm_groups: int = 1
    limits: tuple[float, float] = (0.0, inf)
    bias: bool = False
    conv_bias: bool = True
    prefix: str = "mamba."
    half: ClassVar[str] = "attention"
    forward: ClassVar[str] = "mamba2"

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Those that are convolved: of x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def inputs(self) -> Iterator[Input]:
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=self.made_by)
        norm = (f"{self.prefix}norm.weight",)
        yield Input("attention.out", self.inner, 1, "attention.out", "out", made_by=norm)

    def tensors(self) -> Iterator[Weight]:
        p, heads = self.prefix, self.heads
        rows = self.inner + self.channels + heads
        yield from linear(
            f"{p}in_proj", rows, self.hidden, "attention.qkv", "ssm_in", "attention.in", self.bias, reads=self.reads
        )
        conv = Piece("ssm_conv1d.weight", shape=(self.channels, self.kernel))
        yield Weight(f"{p}conv1d.weight", (self.channels, 1, self.kernel), "small", "ssm_conv1d.weight", pieces=(conv,))
        if self.conv_bias:
            yield Weight(f"{p}conv1d.bias", (self.channels,), "biases", "ssm_conv1d.bias")
        yield Weight(f"{p}dt_bias", (heads,), "small", "ssm_dt.bias")
        decay = Piece("ssm_a", map=Map("decay"), shape=(heads, 1))
        yield Weight(f"{p}A_log", (heads,), "small", "ssm_a", pieces=(decay,))
        yield Weight(f"{p}D", (heads,), "small", "ssm_d", pieces=(Piece("ssm_d", shape=(heads, 1)),))
        runs = Piece("ssm_norm.weight", shape=(self.groups, self.inner // self.groups))
        yield Weight(f"{p}norm.weight", (self.inner,), "norms", "ssm_norm.weight", pieces=(runs,))
        yield from linear(
            f"{p}out_proj", self.hidden, self.inner, "attention.o", "ssm_out", "attention.out", self.bias, writes=True, alone=True
        )  # fmt: skip

    def past(self) -> Past:
        return Past(state=self.inner * self.state + (self.kernel - 1) * self.channels)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            "ssm.conv_kernel": self.kernel,
            "ssm.state_size": self.state,
            "ssm.group_count": self.groups,
            "ssm.time_step_rank": self.heads,
            "ssm.inner_size": self.inner,
        }

    def gguf_problems(self, arch: str) -> Iterator[str]:
        """What llama.cpp's Mamba-2 cannot compute."""
        if self.norm_groups != self.groups:
            yield f"llama.cpp's {arch} norms each of the {self.groups} groups behind the gate; this model norms {self.norm_groups}"
        if self.limits[0] > LEAST or self.limits[1] != inf:
            yield f"llama.cpp's {arch} has no limits of time steps; this model's are {self.limits[0]:g} and {self.limits[1]:g}"
        if not self.conv_bias:
            yield f"llama.cpp's {arch} wants a bias on the convolution; this model has none"
