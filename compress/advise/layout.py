"""How llama.cpp lays a model out over a GPU and main memory, from bytes, and the flags that say so. No torch.

Its rules (src/llama-model.cpp, b9000 and later): -ngl counts from the end, the head as the first; the table of embeddings
stays in main memory, and a head that is tied to it is a copy of its own on a GPU; -ncmoe keeps the experts of the first
layers in main memory; a layer's cache lies where the layer does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.containers import Container, Host
from compress.machine import Machine
from compress.plan.running import Running, gpu_room
from compress.report.numbers import human_bytes

if TYPE_CHECKING:
    from compress.plan.plan import Plan


@dataclass(frozen=True)
class Layer:
    """Bytes of one block: of routed experts, of everything else, and of what it keeps of the past."""

    experts: int
    rest: int
    past: int

    @property
    def whole(self) -> int:
        return self.experts + self.rest + self.past


@dataclass(frozen=True)
class Layout:
    """layers: of the model; on_gpu: of them, the last ones, with the head; experts_off: how many, from the first of the model
    on, have their experts in main memory; gpu, memory: bytes in each."""

    layers: int
    on_gpu: int
    experts_off: int
    gpu: int
    memory: int

    @property
    def whole(self) -> bool:
        """Whether every layer computes on a GPU, its experts too."""
        return self.on_gpu == self.layers and not self.experts_off


@dataclass(frozen=True)
class Stack:
    """A model as llama.cpp takes it apart. head, table: bytes of the head and of the embeddings; tied: one stands for both in
    main memory; beside: bytes of activations, which are where layers compute; process: bytes of the engine itself."""

    layers: tuple[Layer, ...]
    head: int
    table: int
    tied: bool
    beside: int
    process: int

    @classmethod
    def of(cls, plan: Plan, container: Container, running: Running, tokens: int, codec: str) -> Stack:
        """tokens, codec: of the cache."""
        host, own, outline, spec = running.host, plan.own_codec, plan.outline, plan.spec
        sizes = []
        for block in outline.kinds:
            experts = sum(container.tensor_bytes(t, own) for t in block if t.spec.expert is not None)
            sizes.append((experts, sum(container.tensor_bytes(t, own) for t in block) - experts))
        pasts = [sum(host.past_bytes(sublayer.past(), tokens, codec) for sublayer in block) for block in spec.blocks]
        layers = tuple(Layer(*sizes[kind], past) for kind, past in zip(outline.kind_of, pasts, strict=True))
        table, *rest = (container.tensor_bytes(t, own) for t in outline.outer)
        head = sum(rest) + (table if spec.tied else 0)
        return cls(layers, head, table, spec.tied, running.computing(tokens), host.process)

    def split(self, first: int, experts_off: int = 0) -> Layout:
        """Layers from `first` on and the head on a GPU, but for the experts of the layers below `experts_off`; none of it where
        `first` is their number."""
        on = self.layers[first:]
        kept = sum(layer.experts for layer in self.layers[first:experts_off])
        memory = sum(layer.whole for layer in self.layers[:first]) + kept + self.table + self.process
        if not on:
            return Layout(
                len(self.layers), 0, 0, 0, memory + self.beside + self.head - (self.table if self.tied else 0)
            )
        gpu = sum(layer.whole for layer in on) - kept + self.head + self.beside
        return Layout(len(self.layers), len(on), experts_off, gpu, memory)

    def splits(self) -> Iterator[Layout]:
        """With ever less on the GPU: experts go first, layer by layer, then whole layers; in the end there is nothing on it."""
        count = len(self.layers)
        mixed = any(layer.experts for layer in self.layers)
        yield self.split(0)
        yield from (self.split(0, off) for off in range(1, count + 1 if mixed else 1))
        yield from (self.split(first, count if mixed else 0) for first in range(1, count + 1))


def lay_out(stack: Stack, host: Host, machine: Machine) -> Layout | None:
    """As much on the GPU as it holds, as llama.cpp puts it there; None where GPU and main memory together hold nothing."""
    room, here = gpu_room(host, machine), machine.memory.there or 0
    fitting = (layout for layout in stack.splits() if layout.gpu <= room)
    layout = next(fitting)  # with nothing on the GPU it holds it
    return layout if layout.memory <= here else None


def flags(layout: Layout) -> Iterator[tuple[str, str]]:
    """llama.cpp's flags of a layout on a machine with a GPU, each with a sentence."""
    n, on = layout.layers, layout.on_gpu
    if on == n:
        yield f"-ngl {n + 1}", f"all {n} layers and the head on the GPU: {human_bytes(layout.gpu)} there"
    elif on:
        yield (
            f"-ngl {on + 1}",
            f"the last {on} of {n} layers and the head on the GPU, {human_bytes(layout.gpu)}; the others are computed by the processor",
        )
    else:
        yield "-ngl 0", "the GPU does not hold a single layer beside the head: the processor computes"
    if layout.experts_off:
        which = "all layers" if layout.experts_off >= n else f"the first {layout.experts_off} of {n} layers"
        yield (
            f"-ncmoe {layout.experts_off}",
            f"experts of {which} in main memory, {human_bytes(layout.memory)} with all that is there",
        )
