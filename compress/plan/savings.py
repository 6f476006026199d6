"""What steps that make a model smaller save, on disk and in memory, container by container. No torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.codecs.names import codec_info
from compress.containers import Container
from compress.plan.outline import Outline
from compress.plan.tensor import PlannedTensor

STRUCTURAL = ("drop_layers", "prune_experts", "prune_structured")
"""Steps that leave a stock model with fewer tensors or smaller ones, which every container holds."""


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


def shrinking(outline: Outline, containers: Iterable[Container], own: str) -> tuple[Saving, ...]:
    """What prune and factorize save. own: the checkpoint's float codec."""
    containers, lines = tuple(containers), []
    for step, chosen in (
        ("prune", [(t, count) for t, count in outline.counted if t.pattern is not None]),
        ("factorize", [(t, count) for t, count in outline.counted if t.factors is not None]),
    ):
        for container in containers if chosen else ():
            before = container.bytes_of([(t.plain, count) for t, count in chosen], own)
            after = container.bytes_of(chosen, own)
            rows = sum(count * (t.spec.shape[0] + 1) for t, count in chosen if _has_mask(t))
            starts = container.mask_row_bytes * rows
            note = container.shrunk(chosen) if after < before else _why_nothing(container, chosen)
            lines.append(Saving(step, container.name, before, after, after + starts, container.engines, note))
    return tuple(lines)


def _why_nothing(container: Container, tensors: Sequence[tuple[PlannedTensor, int]]) -> str:
    """Why a container is no smaller for what goes."""
    if container.masks is not None:
        return container.masks
    if "sparse" not in container.kinds:
        return f"{container.name} has no masks: zeros take as many bits as other weights"
    if not any(_has_mask(t) for t, _ in tensors):
        return "another container of this recipe has no masks, so zeros are stored like other weights in all of them"
    return "a mask takes as many bits as what goes"


def _has_mask(planned: PlannedTensor) -> bool:
    """Whether masks are stored, which an engine also keeps the starts of rows for."""
    info = codec_info(planned.codec)
    return info.kind == "sparse" or any(
        codec_info(part).kind == "sparse" for part in info.parts if info.kind == "factors"
    )


def structural(chain: Sequence[tuple[str, Outline]], containers: Iterable[Container], own: str) -> tuple[Saving, ...]:
    """What a chain of steps saves. chain: "" and the whole model, then every step and the model it leaves; own: the
    checkpoint's float codec."""
    containers, lines = tuple(containers), []
    for (_, whole), (step, left) in pairwise(chain):
        for container in containers:
            before, after = (container.bytes_of(outline.counted, own) for outline in (whole, left))
            note = "a stock model of the same architecture, smaller and faster in proportion"
            if after >= before:
                note = "nothing of this model goes at this ratio"
            lines.append(Saving(step, container.name, before, after, after, container.engines, note))
    return tuple(lines)
