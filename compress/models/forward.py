"""One decoder block as a pure function of its weights, in float32, with taps on every linear's input.

`forward_block` is the only place that knows how a block computes; families differ by their table alone. A test
compares it with transformers for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UnsupportedModel
from compress.models.spec import ModelSpec

# Inputs become known in this order; weights of one stage can be replaced before the next stage is observed.
STAGES = ("attention.in", "attention.out", "ffn.in", "ffn.act")

Observer = Callable[[str, Tensor, "Tensor | None"], None]


def stage_of(input_key: str) -> int:
    """Index into STAGES of an input key of `TensorSpec.input`."""
    if input_key.startswith("attention"):
        return STAGES.index(input_key)
    return 3 if input_key.endswith("act") else 2


@dataclass(frozen=True)
class Routing:
    """experts: int64 [tokens, k]; weights: float32 [tokens, k]."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Pooled:
    """Cold experts that also see every `stride`-th token of the block, routed to them or not.

    Their activations are observed as `experts.{e}.act.pool`, without a gate; the block's output does not change.
    """

    experts: frozenset[int]
    stride: int


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    # in place only where autograd does not need what was there
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale * weight


@cache
def _rope_tables(spec: _RopeKey, length: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for later calls, some of which meet autograd
        positions = torch.arange(length, dtype=torch.float32)
        angles = torch.outer(positions, spec.inverse_frequencies())
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * spec.attention_factor(), angles.sin() * spec.attention_factor()


class _RopeKey:
    """Hashable by identity: one per ModelSpec, so that tables are computed once."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self._scaled: tuple[Tensor, float] | None = None

    def _compute(self) -> tuple[Tensor, float]:
        spec = self.spec
        if spec.rope_scaling is None:
            exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
            return 1.0 / spec.rope_theta**exponents, 1.0
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        kind = spec.rope_scaling.get("rope_type", spec.rope_scaling.get("type"))
        if kind not in ("linear", "llama3", "yarn"):
            raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3, yarn")
        fields = {k: v for k, v in spec.config.items() if k != "model_type"}
        config = AutoConfig.for_model(spec.model_type, **fields)
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.float(), float(factor)

    def inverse_frequencies(self) -> Tensor:
        if self._scaled is None:
            self._scaled = self._compute()
        return self._scaled[0]

    def attention_factor(self) -> float:
        if self._scaled is None:
            self._scaled = self._compute()
        return self._scaled[1]


_ROPE_KEYS: dict[int, _RopeKey] = {}


def rope_tables(spec: ModelSpec, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, head_dim], for the half-rotation layout of Hugging Face checkpoints."""
    key = _ROPE_KEYS.setdefault(id(spec), _RopeKey(spec))
    return _rope_tables(key, length)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, heads, T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]  # both halves share their angles
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def window_of(spec: ModelSpec, layer: int) -> int | None:
    """Sliding-window length of a layer, None for full attention."""
    kinds, first = spec.config.get("layer_types"), spec.config.get("max_window_layers", 28)
    rule = spec.family.window_rule
    if rule == "all":
        slides = True
    elif kinds is not None:
        slides = kinds[layer] == "sliding_attention"
    else:
        slides = layer >= first if rule == "late" else layer % 2 == 0 and layer < first
    return spec.sliding_window if slides else None


def _attend(spec: ModelSpec, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q: [B, heads, T, d]; k, v: [B, kv_heads, T, d] -> [B, T, heads * d]."""
    length = q.shape[2]
    window = window_of(spec, layer)
    mask = None
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def route(spec: ModelSpec, logits: Tensor) -> Routing:
    """Softmax, top-k, renormalised where the model does. logits: [tokens, experts]."""
    weights, experts = logits.float().softmax(-1).topk(spec.experts_per_token, dim=-1)
    if spec.norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights)


def forward_block(spec: ModelSpec, layer: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Run one block. weights: full checkpoint names -> float32; hidden: float32 [B, T, hidden_size], not modified."""
    middle = forward_attention(spec, layer, weights, hidden)
    assert middle is not None
    out = forward_ffn(spec, layer, weights, middle)
    assert out is not None
    return out


def forward_attention(
    spec: ModelSpec,
    layer: int,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    *,
    observe: Observer | None = None,
    until: int | None = None,
) -> Tensor | None:
    """The attention half of a block, residual included: [B, T, hidden_size] -> the same.

    observe(input_key, x [n, in], routing weight [n] or None) sees the input of every group of linears before it is
    used. until: observe up to this stage and return None.
    """
    root = f"model.layers.{layer}.self_attn."
    x = _norm(spec, weights, f"model.layers.{layer}.input_layernorm", hidden)
    _see(observe, "attention.in", x)
    if until == 0:
        return None
    q, k, v = (_linear(weights, f"{root}{leaf}_proj", x) for leaf in "qkv")
    cos, sin = (t.to(x.device) for t in rope_tables(spec, hidden.shape[1]))

    def heads(x: Tensor, norm_name: str) -> Tensor:
        x = x.view(*x.shape[:2], -1, spec.head_dim)
        if spec.family.qk_norm:
            x = _norm(spec, weights, root + norm_name, x)
        return _rotate(x.transpose(1, 2), cos, sin)

    v = v.view(*v.shape[:2], -1, spec.head_dim).transpose(1, 2)
    x = _attend(spec, layer, heads(q, "q_norm"), heads(k, "k_norm"), v)
    _see(observe, "attention.out", x)
    return None if until == 1 else hidden + _linear(weights, f"{root}o_proj", x)


def forward_ffn(
    spec: ModelSpec,
    layer: int,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    *,
    observe: Observer | None = None,
    until: int | None = None,
    routing: Routing | None = None,
    on_route: Callable[[Routing], None] | None = None,
    pooled: Pooled | None = None,
    experts: frozenset[int] | None = None,
) -> Tensor | None:
    """The feed-forward half of a block, residual included; observe and until as in `forward_attention`.

    routing: use these experts instead of the router's choice; on_route sees the routing used. pooled: see Pooled.
    experts: those whose activations are wanted when `until` cuts the pass short; all by default.
    """
    root = f"model.layers.{layer}."
    x = _norm(spec, weights, root + "post_attention_layernorm", hidden)
    if spec.is_sparse(layer):
        out = _mixture(spec, root, weights, x.flatten(0, -2), observe, until, routing, on_route, pooled, experts)
        return None if out is None else hidden + out.view_as(hidden)
    _see(observe, "mlp.in", x)
    if until == 2:
        return None
    act = F.silu(_linear(weights, root + "mlp.gate_proj", x)) * _linear(weights, root + "mlp.up_proj", x)
    _see(observe, "mlp.act", act)
    return None if until == 3 else hidden + _linear(weights, root + "mlp.down_proj", act)


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _norm(spec: ModelSpec, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return rms_norm(x, weights[name + ".weight"], spec.norm_eps)


def _see(observe: Observer | None, key: str, x: Tensor, gate: Tensor | None = None) -> None:
    if observe is not None:
        observe(key, x.reshape(-1, x.shape[-1]), gate)


def _mixture(
    spec: ModelSpec,
    root: str,
    weights: Mapping[str, Tensor],
    x: Tensor,
    observe: Observer | None,
    until: int | None,
    routing: Routing | None,
    on_route: Callable[[Routing], None] | None,
    pooled: Pooled | None,
    experts: frozenset[int] | None,
) -> Tensor | None:
    """Routed and shared experts of one block. x: [tokens, hidden]."""
    moe = spec.family.moe
    assert moe is not None
    _see(observe, "router", x)
    if routing is None:
        routing = route(spec, F.linear(x, weights[root + moe.router]))
    if on_route is not None:
        on_route(routing)
    out = torch.zeros_like(x)

    def activate(prefix: str, rows: Tensor) -> Tensor:
        return F.silu(rows @ weights[f"{prefix}{moe.gate}.weight"].T) * (rows @ weights[f"{prefix}{moe.up}.weight"].T)

    for e in range(spec.experts):
        if until == 3 and experts is not None and e not in experts:
            continue
        prefix = root + moe.expert.format(e=e)
        if pooled is not None and e in pooled.experts:
            _see(observe, f"experts.{e}.act.pool", activate(prefix, x[:: pooled.stride]))
        tokens, slot = (routing.experts == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate_weight = routing.weights[tokens, slot]
        rows = x[tokens]
        _see(observe, f"experts.{e}.in", rows, gate_weight)
        if until == 2:
            continue
        act = activate(prefix, rows)
        _see(observe, f"experts.{e}.act", act, gate_weight)
        if until == 3:
            continue
        out.index_add_(0, tokens, (act @ weights[f"{prefix}{moe.down}.weight"].T) * gate_weight[:, None])
    if moe.shared:
        _see(observe, "shared.in", x)
        if until != 2:
            prefix = root + moe.shared
            act = F.silu(x @ weights[f"{prefix}gate_proj.weight"].T) * (x @ weights[f"{prefix}up_proj.weight"].T)
            _see(observe, "shared.act", act)
            if until != 3:
                shared = act @ weights[f"{prefix}down_proj.weight"].T
                if moe.shared_router:
                    shared = torch.sigmoid(x @ weights[root + moe.shared_router].T) * shared
                out += shared
    return None if until is not None else out
