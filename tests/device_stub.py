"""A second device on any machine: tensors that say they live on `cuda:0`, compute on the CPU, and refuse to meet CPU ones.

    with second_device():
        x = cpu_tensor.to("cuda")  # and every factory with device="cuda:0"
        y = function(x)
    torch.equal(y.cpu(), function(cpu_tensor))

The numbers are those of the CPU, bit for bit, because every call runs on the very memory of plain tensors; views, in-place
operations, `out=` and autograd work for the same reason. What would fail on a GPU raises here, as there:

- an operation on tensors of both devices (a CPU tensor without dimensions may take part in element-wise operations);
- `.numpy()` and whatever else needs the memory of the CPU;
- a random generator of the CPU for a tensor of the other device.

Stricter than CUDA: an index or an assigned value on the CPU is an error, too, because each would wait for the device.
`.item()`, `.tolist()` and `bool()` wait as well, but are allowed; `synchronized()` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

DEVICE = torch.device("cuda", 0)

_MOVES = {"to", "cpu", "cuda"}
_ASKS_DEVICE = {Tensor.device.__get__: DEVICE, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
_NEEDS_CPU = {"numpy", "__array__", "data_ptr"}
_READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__"}
_NO_SCALARS = {"cat", "stack", "index_select", "gather", "scatter", "scatter_", "index_add_", "mm", "matmul", "addmm"}
"""Operations that take no CPU tensor, whatever its dimensions."""

_reads: dict[str, int] = {}


class StubTensor(torch.Tensor):
    """A plain tensor that the operations below take for one of the other device; made by `on_device` alone."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, tuple(args), dict(kwargs or {}))


class _Factories(TorchFunctionMode):
    """Catches the calls that no StubTensor takes part in: factories, and plain tensors that move."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, tuple(args), dict(kwargs or {}))


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within, `cuda` and `cuda:0` are the stub; gives its torch.device."""
    with _Factories():
        yield DEVICE


def on_device(tensor: Tensor) -> Tensor:
    """The same memory, on the stub."""
    return tensor.as_subclass(StubTensor)


def synchronized() -> Mapping[str, int]:
    """How often the CPU has waited for a number of the stub since the last call, by how it asked."""
    found = dict(_reads)
    _reads.clear()
    return found


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One torch function or method; here StubTensors are what they are in memory, plain tensors of the CPU."""
    if func in _ASKS_DEVICE:
        return _ASKS_DEVICE[func] if isinstance(args[0], StubTensor) else func(*args)
    name = getattr(func, "__name__", "")
    if name == "_has_compatible_shallow_copy_type":  # nn.Module.to: a parameter that moves becomes another tensor
        return False
    if name in _MOVES and args and isinstance(args[0], Tensor):
        return _move(func, name, args, kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    stubs = [t for t in tensors if isinstance(t, StubTensor)]
    wanted, kwargs = _device_of(kwargs)
    if stubs:
        _check(name, tensors)
        if name in _READS:
            _reads[name] = _reads.get(name, 0) + 1
    if wanted == DEVICE and getattr(kwargs.get("generator"), "device", DEVICE).type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    result = func(*args, **kwargs)
    there = wanted or (DEVICE if stubs else torch.device("cpu"))
    # what an operation gives back of its arguments is where it was
    return pytree.tree_map(lambda leaf: leaf if any(leaf is t for t in tensors) else _placed(leaf, there), result)


def _placed(leaf: Any, device: torch.device) -> Any:
    """A result on the device where it belongs."""
    plain = isinstance(leaf, Tensor) and not isinstance(leaf, StubTensor)
    return on_device(leaf) if plain and device == DEVICE else leaf


def _check(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises as CUDA does where an operation with a StubTensor cannot work."""
    if name in _NEEDS_CPU:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first ({name})")
    if name == "copy_":
        return
    for tensor in tensors:
        alone = tensor.dim() == 0 and name not in _NO_SCALARS
        if not isinstance(tensor, StubTensor) and not alone:
            raise RuntimeError(f"Expected all tensors to be on the same device, but got cpu and {DEVICE} ({name})")


def _device_of(kwargs: dict[str, Any]) -> tuple[torch.device | None, dict[str, Any]]:
    """The device that a factory is told, and the other keywords for the CPU."""
    if kwargs.get("device") is None:
        return None, kwargs
    device = _resolved(kwargs["device"])
    return device, kwargs | {"device": device if device.type == "meta" else torch.device("cpu")}


def _resolved(device: Any) -> torch.device:
    device = torch.device(device)
    return DEVICE if device.type == "cuda" else device


def _move(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`to`, `cpu` and `cuda`: a copy where the device changes; else what the CPU gives, where it was."""
    source, *others = args
    here = DEVICE if isinstance(source, StubTensor) else source.device
    there = {"cpu": torch.device("cpu"), "cuda": DEVICE}.get(name, here)
    rest = []
    for other in others:
        if isinstance(other, Tensor):
            there = DEVICE if isinstance(other, StubTensor) else other.device
            rest.append(other.dtype)
        elif isinstance(other, (torch.device, str, int)) and not isinstance(other, bool):
            there = _resolved(other)
        elif isinstance(other, torch.dtype):
            rest.append(other)
    wanted, kwargs = _device_of(kwargs)
    kwargs.pop("device", None)
    there = wanted or there
    if there.type == "meta":
        return func(source, there, *rest, **kwargs)
    result = Tensor.to(source, *rest, **kwargs) if rest or kwargs else source
    if here != there and result is source:
        result = source.clone()
    if there != DEVICE and isinstance(result, StubTensor):
        result = result.as_subclass(Tensor)
    return _placed(result, there)
