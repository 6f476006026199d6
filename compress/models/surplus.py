"""What a checkpoint holds beyond the decoder that its config.json describes: what goes along, what is left out, what cannot be.
No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from compress.models.checkpoint import Checkpoint, same_bytes
from compress.models.draft import ROLE, draft_of
from compress.models.index import Entry
from compress.models.layers.base import Weight
from compress.models.sources.base import stored_bytes
from compress.models.spec import CARRIED, MTP, ModelSpec, TensorSpec
from compress.reading import shown

_BUFFERS = ("rotary_emb.inv_freq",)  # what older versions of transformers saved and nobody reads
_DRAFT = "mtp."  # the heads that predict further tokens, beside the model
_GGUF_DRAFT = "mtp.blk."  # the same in a GGUF file, in its own order and under its own names
_SHOWN = 3


@dataclass
class Surplus:
    """problems: why the model cannot be what config.json says; beside: tensors that are no part of the decoder and go along
    with it; left: names of those that nothing of the model's is made of."""

    problems: list[str] = field(default_factory=list)
    beside: tuple[TensorSpec, ...] = ()
    left: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What is left out, a line for each reason."""
        drafts = [name for name in self.left if name.startswith(_GGUF_DRAFT)]
        others = [name for name in self.left if name not in drafts]
        told = []
        if drafts:
            told.append(f"left out, as a GGUF file has its MTP layer in llama.cpp's own order: {some_of(drafts)}")
        if others:
            told.append(f"left out, as config.json does not imply it: {some_of(others)}")
        return told


def surplus(spec: ModelSpec, checkpoint: Checkpoint) -> Surplus:
    """What the checkpoint holds that the decoder of `spec` does not.

    A tensor under the decoder's own names changes what it computes: a bias, a norm, a layer too many, a head of its own
    beside tied embeddings. Draft layers, the other parts of a multimodal model, further heads, saved buffers and biases of zeros
    stand beside it; of these the first two go along, where they are floats.
    """
    planned = {t.name for t in spec.tensors()}
    entries = checkpoint.entries
    planned |= {entry.part.name for name, entry in entries.items() if entry.part and name in planned}
    renamed = {entry.part.name for entry in entries.values() if entry.part and entry.part.whole}
    extra = sorted(set(entries) - planned - renamed)
    found = Surplus()
    if spec.tied and (head := spec.untied().head) in extra:
        extra.remove(head)
        if not same_bytes(entries[head], entries[spec.embeddings]):
            found.problems.append(
                f"config.json says tie_word_embeddings, but the checkpoint holds another {head} than "
                f"{spec.embeddings}; set tie_word_embeddings to false to keep this head, or take it out of the checkpoint"
            )
    roots = {name.split(".")[0] for name in planned} | {spec.untied().head.split(".")[0]}
    drafts = int(spec.config.get("num_nextn_predict_layers") or 0)
    inside: list[str] = []
    layers: list[str] = []
    beside: list[TensorSpec] = []
    drafted, stored = _draft(spec, checkpoint)
    for name in extra:
        if name in drafted:
            beside.append(drafted[name])
            continue
        if name in stored:
            continue
        layer = _layer(spec, name)
        if name.endswith(_BUFFERS) or name.startswith(_GGUF_DRAFT):
            found.left.append(name)
        elif name.startswith(_DRAFT) or (layer is not None and spec.layers <= layer < spec.layers + drafts):
            beside.append(_of_mtp(name, entries[name].shape))
        elif spec.wrapper is not None and not name.startswith((spec.wrapper.body, spec.names.head)):
            beside.append(_of_wrapper(name, entries[name].shape))
        elif name.split(".")[0] not in roots or _no_bias(name, entries[name]):
            found.left.append(name)
        else:
            (inside if layer is None or layer < spec.layers else layers).append(name)
    found.left += [t.name for t in beside if entries[t.name].codec is None]
    found.beside = tuple(t for t in beside if entries[t.name].codec is not None)
    if layers:
        most = max(layer for name in layers if (layer := _layer(spec, name)) is not None)
        found.problems.append(
            f"the checkpoint holds layers up to {most}, config.json says num_hidden_layers {spec.layers} (0 to "
            f"{spec.layers - 1}); correct num_hidden_layers, or fetch the config.json of this checkpoint"
        )
    if inside:
        found.problems.append(
            f"the checkpoint holds {some_of(inside)}, which config.json does not imply, and the model computes something else "
            "without; correct config.json (a bias, a norm or an option is missing there), or fetch the right one"
        )
    return found


def _draft(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[dict[str, TensorSpec], set[str]]:
    """The layer that predicts a further token as its family declares it, by name, and names that hold parts of it; where the
    checkpoint has another one, nothing, and the parts that are declared alone."""
    entries, declared = checkpoint.entries, draft_of(spec)
    parts = {t.name: part for t in declared if t.name in entries and (part := entries[t.name].part) and not part.whole}
    if any(t.name not in entries or entries[t.name].shape != t.shape for t in declared):
        return {}, set(parts)
    return {t.name: t for t in declared}, {part.name for part in parts.values()}


def _no_bias(name: str, entry: Entry) -> bool:
    """Whether a tensor is a bias of zeros, as AutoGPTQ wrote them."""
    return name.endswith(".bias") and not any(stored_bytes(entry))


def _of_mtp(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """A tensor of a draft layer. Its matrices have a role of their own, all else those of its like in the decoder."""
    if len(shape) < 2:
        role = "norms" if "norm" in name else "biases" if name.endswith("bias") else "small"
    elif len(shape) > 2 and "conv" in name:
        role = "small"
    elif re.search(r"(\.|_)(gate|router)\.weight$", name):
        role = "router"
    else:
        role = "embeddings" if "embed_tokens" in name else "lm_head" if name.endswith("head.weight") else ROLE
    return TensorSpec(name, shape, role, None, None, "", None, declared=Weight(name, shape, role, ""), beside=MTP)


def _of_wrapper(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """A tensor of another part of a multimodal model, called after what holds it: model.visual, vision_tower."""
    parts = name.split(".")
    part = ".".join(parts[: 2 if parts[0] == "model" else 1])
    return TensorSpec(
        name, shape, CARRIED, None, None, "", None, declared=Weight(name, shape, CARRIED, ""), beside=part
    )


def _layer(spec: ModelSpec, name: str) -> int | None:
    front, behind = map(re.escape, spec.names.block.split("{n}"))
    found = re.match(front + r"(\d{1,9})" + behind, name)
    return int(found[1]) if found else None


def some_of(names: Iterable[str]) -> str:
    """A few kinds of names, numbers aside, and how many tensors there are in all."""
    names = list(names)
    kinds = dict(reversed([(re.sub(r"\d+", "N", name), name) for name in names]))
    few = sorted(kinds.values())[:_SHOWN]
    return ", ".join(map(shown, few)) + (f" ({len(names)} tensors in all)" if len(names) > len(few) else "")
