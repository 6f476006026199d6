"""What goes along with the decoder: heads that predict further tokens, the other parts of a multimodal model. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.containers import Container
from compress.models.spec import MTP, ModelSpec, TensorSpec
from compress.plan.savings import STRUCTURAL
from compress.reading import shown
from compress.recipe.schema import Recipe


@dataclass(frozen=True)
class Along:
    """kept: the tensors that any container of the recipe has a place for; lines: what becomes of each part, for people;
    problems: why the recipe cannot be carried out with them."""

    kept: tuple[TensorSpec, ...] = ()
    lines: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def going_along(recipe: Recipe, spec: ModelSpec, seen: bool) -> Along:
    """What a recipe makes of what stands beside the decoder. seen: whether the checkpoint was there to be looked at."""
    if not seen:
        return Along(lines=tuple(_unseen(recipe, spec)), problems=tuple(_turned(recipe, spec)))
    kept: list[TensorSpec] = []
    lines = []
    parts: dict[str, list[TensorSpec]] = {}
    for tensor in spec.beside:
        parts.setdefault(tensor.beside, []).append(tensor)
    for part, tensors in parts.items():
        why = _cannot(recipe) if part == MTP else None
        found = [] if why else [t for t in tensors if any(c.has_place(t) for c in recipe.containers)]
        kept += found
        lines.append(_line(part, tensors, recipe.containers, why))
    return Along(tuple(kept), tuple(lines), tuple(_turned(recipe, spec)))


def _cannot(recipe: Recipe) -> str | None:
    """Why draft layers cannot stay with the decoder that a recipe makes."""
    if recipe.step("rotate") is not None:
        return "rotate turns the stream that it reads"
    steps = [kind for kind in STRUCTURAL if recipe.step(kind) is not None]
    return f"{' and '.join(steps)} give config.json other sizes than it has" if steps else None


def _turned(recipe: Recipe, spec: ModelSpec) -> Iterator[str]:
    rotate = recipe.step("rotate")
    carrying = [c.name for c in recipe.containers if not c.suffix]
    if spec.wrapper is not None and rotate is not None and "R1" in rotate.kinds and carrying:
        yield (
            f"rotate: the other parts of {spec.architecture} write to the stream that R1 turns; use kinds: [R2], or export "
            "what holds the language model alone (gguf)"
        )


def _unseen(recipe: Recipe, spec: ModelSpec) -> Iterator[str]:
    if spec.wrapper is None:
        return
    folders = [c.name for c in recipe.containers if not c.suffix]
    files = [c.name for c in recipe.containers if c.suffix]
    told = [f"go along in {' and '.join(folders)} as they are"] if folders else []
    told += [f"are left out of {' and '.join(files)}"] if files else []
    yield f"{spec.architecture}: the parts around its language model {', and '.join(told)}"


def _line(part: str, tensors: Sequence[TensorSpec], containers: Sequence[Container], why: str | None) -> str:
    """What becomes of one part."""
    named = f"{shown(part)} ({len(tensors)} tensors, {sum(t.parameters for t in tensors):,} parameters)"
    if why is not None:
        return f"{named} is left out: {why}"
    inside = [c.name for c in containers if all(c.has_place(t) for t in tensors)]
    outside = {c.name: c.no_place(tensors[0]) for c in containers if c.name not in inside}
    kind = "as the recipe rounds it" if part == MTP else "as it is"
    told = [f"goes along in {' and '.join(dict.fromkeys(inside))} {kind}"] if inside else []
    told += [f"is left out of {name}: {reason}" for name, reason in outside.items()]
    return f"{named} {'; '.join(told)}"
