"""Sub-layers that a module of transformers computes: called with the weights at hand, tapped at its linears.

The module is built once without weights; `functional_call` puts the original's or the compressed ones in for a pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compress.models.forward.base import Named, Taps
from compress.models.layers.hosted import Hosted
from compress.models.spec import Branch


class _Ended(Exception):
    """The taps have seen what they wanted."""


def forward(branch: Branch, weights: Named, x: Tensor, taps: Taps) -> Tensor | None:
    """x: [B, T, hidden], normed -> what is added to the stream, or None."""
    layer = branch.sublayer
    assert isinstance(layer, Hosted)
    module = _module(layer.module, layer.config, branch.layer)
    own = {name: weights[layer.prefix + name] for name in _names(layer)}
    kwargs: dict[str, Any] = {}
    if layer.rotary:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        seen = positions <= positions.T if layer.masked else None
        kwargs = {
            "position_embeddings": _rotary(layer.rotary, layer.config, x.device)(x, positions),
            "attention_mask": None if seen is None else seen[None, None].expand(len(x), 1, -1, -1),
        }
    try:
        with ExitStack() as hooks:
            for name, see in _taps(layer, taps).items():
                hooks.callback(module.get_submodule(name).register_forward_pre_hook(see).remove)
            out = functional_call(module, own, (x,), kwargs)
    except _Ended:
        return None
    return out[0] if isinstance(out, tuple) else out


def _taps(layer: Hosted, taps: Taps) -> Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]]:
    """Hooks that show the inputs of linears, and end the pass behind the last one that is wanted."""
    wanted = {key for key, given in layer.known.items() if taps.until is not None and given.stage <= taps.until}

    def hook(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            taps.see(key, given[0])
            if key in wanted:
                wanted.discard(key)
                if not wanted:
                    raise _Ended

        return see

    return {name: hook(key) for name, key in layer.linears.items()}


@cache
def _names(layer: Hosted) -> tuple[str, ...]:
    """The tensors that are the module's own."""
    return tuple(w.name.removeprefix(layer.prefix) for w in layer.weights if w.name.startswith(layer.prefix))


@cache
def _config(text: str) -> Any:
    from transformers import AutoConfig

    fields = json.loads(text)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "sdpa"
    return config


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


_MODULES: dict[tuple[str, str], nn.Module] = {}


def _module(path: str, config: str, layer: int) -> nn.Module:
    """The module without weights; the number of its layer decides about its cache alone."""
    if (path, config) not in _MODULES:
        with torch.inference_mode(False), torch.device("meta"):
            _MODULES[path, config] = _class(path)(_config(config), layer_idx=layer).eval()
    return _MODULES[path, config]


@cache
def _rotary(path: str, config: str, device: torch.device) -> nn.Module:
    with torch.inference_mode(False):
        return _class(path)(_config(config)).to(device)
