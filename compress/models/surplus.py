"""What a checkpoint holds beyond the model that its config.json describes. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from compress.models.checkpoint import Checkpoint, same_bytes
from compress.models.sources.base import stored_bytes
from compress.models.spec import ModelSpec
from compress.reading import shown

_BUFFERS = ("rotary_emb.inv_freq",)  # what older versions of transformers saved and nobody reads
_DRAFT = "mtp."  # the head that predicts further tokens, beside the model
_SHOWN = 3


def surplus(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Why the model cannot be what config.json says, and a line for all that is left out of it.

    A tensor under the model's own roots changes what it computes: a bias, a norm, a layer too many, a head of its own
    beside tied embeddings. Draft layers, further heads, saved buffers and biases of zeros stand beside it.
    """
    planned = {t.name for t in spec.tensors()}
    planned |= {entry.part.name for name, entry in checkpoint.entries.items() if entry.part and name in planned}
    extra = sorted(set(checkpoint.entries) - planned)
    problems: list[str] = []
    if spec.tied and (head := spec.untied().head) in extra:
        extra.remove(head)
        if not same_bytes(checkpoint.entries[head], checkpoint.entries[spec.embeddings]):
            problems.append(
                f"config.json says tie_word_embeddings, but the checkpoint holds another {head} than "
                f"{spec.embeddings}; set tie_word_embeddings to false to keep this head, or take it out of the checkpoint"
            )
    roots = {name.split(".")[0] for name in planned} | {spec.untied().head.split(".")[0]}
    drafts = int(spec.config.get("num_nextn_predict_layers") or 0)
    inside: list[str] = []
    layers: list[str] = []
    beside: list[str] = []
    for name in extra:
        layer = _layer(spec, name)
        if (
            name.endswith(_BUFFERS)
            or name.startswith(_DRAFT)
            or name.split(".")[0] not in roots
            or (layer is not None and spec.layers <= layer < spec.layers + drafts)
            or (name.endswith(".bias") and not any(stored_bytes(checkpoint.entries[name])))  # as AutoGPTQ wrote them
        ):
            beside.append(name)
        else:
            (inside if layer is None or layer < spec.layers else layers).append(name)
    if layers:
        most = max(layer for name in layers if (layer := _layer(spec, name)) is not None)
        problems.append(
            f"the checkpoint holds layers up to {most}, config.json says num_hidden_layers {spec.layers} (0 to "
            f"{spec.layers - 1}); correct num_hidden_layers, or fetch the config.json of this checkpoint"
        )
    if inside:
        problems.append(
            f"the checkpoint holds {some_of(inside)}, which config.json does not imply, and the model computes something else "
            "without; correct config.json (a bias, a norm or an option is missing there), or fetch the right one"
        )
    return problems, [f"left out, as config.json does not imply it: {some_of(beside)}"] if beside else []


def _layer(spec: ModelSpec, name: str) -> int | None:
    front, behind = map(re.escape, spec.family.names.block.split("{n}"))
    found = re.match(front + r"(\d{1,9})" + behind, name)
    return int(found[1]) if found else None


def some_of(names: Iterable[str]) -> str:
    """A few kinds of names, numbers aside, and how many tensors there are in all."""
    names = list(names)
    kinds = dict(reversed([(re.sub(r"\d+", "N", name), name) for name in names]))
    few = sorted(kinds.values())[:_SHOWN]
    return ", ".join(map(shown, few)) + (f" ({len(names)} tensors in all)" if len(names) > len(few) else "")
