"""What steps that make a model smaller save, on disk and in memory, container by container. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from compress.codecs.names import CONTAINERS, codec_info, stored_bytes
from compress.containers import container_module
from compress.models.spec import ModelSpec
from compress.plan.tensor import PlannedTensor

STRUCTURAL = ("drop_layers", "prune_experts", "prune_structured")
"""Steps that leave a stock model with fewer tensors or smaller ones, which every container holds."""

START_BYTES = 8  # of a row of a masked matrix at run time: where its values begin

DENSE_WHY = {
    "gguf": "GGUF has no sparse types: zeros take as many bits as other weights",
    "gptq": "the GPTQ layout has no masks: zeros take as many bits as other weights",
    "awq": "the AWQ layout has no masks: zeros take as many bits as other weights",
    "bitsandbytes": "bitsandbytes has no masks: zeros take as many bits as other weights",
    "compressed-tensors": "its sparse formats (sparse-bitmask, sparse-24-bitmask, marlin-24) are no longer loaded by the "
    "package (0.19), transformers or vLLM, so zeros are stored like other weights",
    "safetensors": "it is dense: it holds the zeros, or the product of the factors",
}


@dataclass(frozen=True, slots=True)
class Saving:
    """What one step saves in one container.

    before, after: bytes of the weights it works on, as the file stores them; memory: bytes of them that the engine holds
    at run time; engine: who runs it; note: how, or why it saves nothing.
    """

    step: str
    container: str
    before: int
    after: int
    memory: int
    engine: str
    note: str

    @property
    def nothing(self) -> bool:
        return self.after >= self.before

    def __str__(self) -> str:
        return f"{self.step} saves nothing in {self.container}: {self.note}"


def container_bytes(container: str, planned: PlannedTensor, own: str) -> int:
    """Bytes of one tensor in a container; own: the float type of the checkpoint, which dense folders have."""
    if container == "safetensors":
        return stored_bytes(own, planned.spec.shape)
    return container_module(container).tensor_bytes(planned)


def shrinking(tensors: Iterable[PlannedTensor], containers: Iterable[str], own: str) -> tuple[Saving, ...]:
    """What prune and factorize save."""
    tensors, containers, lines = tuple(tensors), tuple(dict.fromkeys(containers)), []
    for step, chosen in (
        ("prune", [t for t in tensors if t.pattern is not None]),
        ("factorize", [t for t in tensors if t.factors is not None]),
    ):
        for container in containers if chosen else ():
            before = sum(container_bytes(container, t.plain, own) for t in chosen)
            after = sum(container_bytes(container, t, own) for t in chosen)
            starts = sum(
                START_BYTES * (t.spec.shape[0] + 1) for t in chosen if container == "compress" and _has_mask(t)
            )
            note = (
                DENSE_WHY.get(container, "a mask takes as many bits as what goes") if after >= before else _how(chosen)
            )
            if after >= before and container == "compress" and not any(_has_mask(t) for t in chosen):
                note = "another container of this recipe has no masks, so zeros are stored like other weights in all of them"
            lines.append(Saving(step, container, before, after, after + starts, CONTAINERS[container].engines, note))
    return tuple(lines)


def _has_mask(planned: PlannedTensor) -> bool:
    """Whether masks are stored, which an engine also keeps the starts of rows for."""
    info = codec_info(planned.codec)
    return info.kind == "sparse" or any(
        codec_info(part).kind == "sparse" for part in info.parts if info.kind == "factors"
    )


def _how(tensors: list[PlannedTensor]) -> str:
    """How the engine of our own container computes with them."""
    if any(t.factors is not None for t in tensors):
        dense = sum(t.spec.parameters for t in tensors)
        used = sum((t.factors or (0, 0))[0] * t.spec.shape[1] + (t.kept or 0) for t in tensors)
        return f"two products instead of one, {used / dense:.0%} of the multiplications"
    return "masks and values stay packed, rows are expanded a MiB at a time; no faster than dense"


def structural(
    specs: list[tuple[str, ModelSpec]], containers: Iterable[str], size: Callable[[str, ModelSpec], int]
) -> tuple[Saving, ...]:
    """What a chain of steps saves. specs: "" and the whole model, then every step and the model it leaves; size:
    (container, model) to bytes."""
    containers, lines = tuple(dict.fromkeys(containers)), []
    for (_, whole), (step, left) in pairwise(specs):
        for container in containers:
            before, after = size(container, whole), size(container, left)
            note = "a stock model of the same architecture, smaller and faster in proportion"
            if after >= before:
                note = "nothing of this model goes at this ratio"
            lines.append(Saving(step, container, before, after, after, CONTAINERS[container].engines, note))
    return tuple(lines)
