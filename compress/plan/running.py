"""What running an artifact takes: weights, what is kept of past tokens, room to compute; the longest context that fits. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.containers import Container, Host
from compress.models.layers.base import Past

if TYPE_CHECKING:
    from compress.machine import Machine
    from compress.models.spec import ModelSpec
    from compress.plan.plan import Plan

STEP = 256
"""Contexts are multiples of it, as llama.cpp makes them."""
SHORTEST = 4096
"""Tokens of context below which a model is no use for a conversation: whatever holds fewer does not hold the model."""


@dataclass(frozen=True)
class Running:
    """One artifact in one engine.

    weights: bytes of its tensors; pasts: what its sub-layers keep, each with how many do; vocabulary, inside: values a token
    of the logits, and of what one layer holds at once while it computes; longest: the tokens that the model knows positions
    for.
    """

    container: str
    host: Host
    weights: int
    pasts: tuple[tuple[Past, int], ...]
    vocabulary: int
    inside: int
    longest: int

    @cached_property
    def codecs(self) -> tuple[str, ...]:
        """Codecs that the cache of keys and values can have, the usual one first."""
        return tuple(codec for codec in self.host.cache if all(self.host.keeps(past, codec) for past, _ in self.pasts))

    def cache(self, tokens: int, codec: str) -> int:
        """Bytes of what is kept of so many tokens."""
        return sum(count * self.host.past_bytes(past, tokens, codec) for past, count in self.pasts)

    def per_1k(self, codec: str) -> int:
        """Bytes that the first 1,024 tokens add; sliding windows add less once they are full."""
        return self.cache(1024, codec) - self.cache(0, codec)

    def computing(self, tokens: int) -> int:
        """About the bytes of activations while a batch of a prompt is read, the last of so many tokens: a layer's, and logits
        or the attention's masks in 16 bits, one for every kind of window; where tokens are scored first, a float of each and
        another mask."""
        windows = {past.window for past, _ in self.pasts if past.token}
        masks = sum(self.host.seen(window, tokens) for window in windows) if None in windows else tokens
        scores = 6 * tokens if any(past.scored for past, _ in self.pasts) else 0
        return self.host.batch * (max(4 * self.vocabulary, 2 * masks + scores) + 4 * self.inside)

    def needed(self, tokens: int, codec: str) -> int:
        """Bytes of all that is held with a context of so many tokens."""
        return self.weights + self.cache(tokens, codec) + self.computing(tokens) + self.host.process

    @property
    def least(self) -> int:
        """Tokens of the shortest context worth running with."""
        return min(SHORTEST, self.longest)

    def context(self, there: int, codec: str) -> int:
        """The longest context that fits into so many bytes; 0 where none does."""
        if self.needed(min(STEP, self.longest), codec) > there:
            return 0
        if self.needed(self.longest, codec) <= there:
            return self.longest
        low, high = 1, -(-self.longest // STEP)  # fits, does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed(middle * STEP, codec) <= there else (low, middle)
        return low * STEP

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "container": self.container,
            "engine": self.host.name,
            "weights_bytes": self.weights,
            "computing_bytes": self.computing(self.least),
            "engine_bytes": self.host.process,
            "kept_bytes_per_1k_tokens": {codec: self.per_1k(codec) for codec in self.codecs},
            "kept_bytes_whatever_the_length": self.cache(0, self.codecs[0]),
            "longest_context": self.longest,
        }


@dataclass(frozen=True)
class Room:
    """Where an engine can hold a model on a machine. gpu: on GPUs, or on them and in main memory together."""

    words: str
    there: int
    gpu: bool


def running(plan: Plan) -> tuple[Running, ...]:
    """Every artifact of a plan in every engine whose memory is known."""
    found = []
    for container in plan.recipe.containers:
        weights = container.bytes_of(plan.counted, plan.own_codec)
        found += [runner(plan.spec, container, host, weights) for host in container.hosts]
    return tuple(found)


def runner(spec: ModelSpec, container: Container, host: Host, weights: int) -> Running:
    """A model in an engine. weights: bytes of the artifact's tensors."""
    host = host.of(spec)
    experts = spec.experts_per_token * spec.moe_intermediate_size + spec.shared_intermediate_size
    inside = (8 + spec.experts_per_token) * spec.hidden_size + 3 * max(spec.intermediate_size, experts)
    return Running(container.name, host, weights, kept(spec), spec.vocab_size, inside, spec.max_positions)


def kept(spec: ModelSpec) -> tuple[tuple[Past, int], ...]:
    """What the sub-layers of a model keep of past tokens, each kind with how many there are."""
    each = Counter(sublayer for block in spec.blocks for sublayer in block)
    found: Counter[Past] = Counter()
    for sublayer, count in each.items():
        found[sublayer.past()] += count
    return tuple((past, count) for past, count in found.items() if past != Past())


def rooms(host: Host, machine: Machine) -> tuple[Room, ...]:
    """Where an engine can hold a model on a machine, the fastest first."""
    here = machine.memory.there
    found = []
    if vram := gpu_room(host, machine):
        found.append(Room(gpu_words(machine), vram, True))
        if host.layers and here is not None:
            found.append(Room(f"{gpu_words(machine)} and in memory", vram + here, True))
    if here is not None and not host.gpu and not any(room.gpu and host.layers for room in found):
        found.append(Room("in memory", here, False))
    return tuple(found)


def gpu_room(host: Host, machine: Machine) -> int:
    """Bytes of all GPUs that an engine can fill."""
    return sum(max(0, min(gpu.free, int(host.share * gpu.total)) - host.spare) for gpu in machine.gpus)


def gpu_words(machine: Machine) -> str:
    """The GPUs of a machine that has some."""
    return "on the GPU" if len(machine.gpus) == 1 else f"on {len(machine.gpus)} GPUs"
