"""A GGUF's metadata as the config.json that it was made from, by what families declare of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compress.errors import CheckpointError, ConfigError, UnsupportedModel
from compress.models.gguf.header import Header
from compress.models.gguf.keys import Metadata, architecture_keys, same
from compress.models.gguf.tensors import ROPE_FACTORS
from compress.models.layers.rope import scaling_of
from compress.models.spec import Family, ModelSpec, known_families, load_spec
from compress.reading import in_words, shortened, shown

_SILENT = ("rope.scaling.finetuned", "nextn_predict_layers", "attention.causal", "expert_gating_func")
"""Keys that change nothing of what is read here, or that choose the family."""
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def config_of(header: Header) -> tuple[dict[str, Any], ModelSpec, list[str]]:
    """config.json of a file, the model that it implies, and lines for what of the metadata is not read.

    Raises UnsupportedModel for an architecture that is not read, or that says what its family cannot; CheckpointError for
    metadata that make no sense.
    """
    path = header.files[0]
    arch = header.fields.get("general.architecture")
    families = list({id(f): f for f in known_families().values()}.values())
    if not any(arch in family.gguf.archs for family in families):
        known = ", ".join(sorted({name for family in families for name in family.gguf.archs}))
        raise UnsupportedModel(
            f"{path} is a GGUF of the architecture {in_words(arch)}; those that are read as a model: {known}"
        )
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{path} holds no table of embeddings (token_embd.weight): it is no whole model")
    names, factors = frozenset(header.tensors), _factors(header)
    metadata = Metadata(str(path), str(arch), header.fields, names, table.shape[0], factors)
    family = next((f for f in families if arch in f.gguf.archs and f.gguf.claims(metadata)), None)
    if family is None:
        raise UnsupportedModel(f"{path}: no model of the architecture {arch} that is read here is like this one")
    try:
        config = _config(family, metadata, header)
        spec = load_spec(config)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: its metadata makes no sound model: {'; '.join(shortened(error.problems)[:3])}; fetch it again"
        ) from None
    _require_same(metadata, spec)
    return config, spec, list(_unread(metadata, spec))


def _config(family: Family, metadata: Metadata, header: Header) -> dict[str, Any]:
    said = {"hidden_act": "silu", "vocab_size": metadata.rows, "num_hidden_layers": len(metadata.layers)}
    said |= {name: value for name, key in _declared(family, "GGUF").items() if (value := metadata.get(key)) is not None}
    said |= {name: metadata.has(tensor) for name, tensor in _declared(family, "GGUF_HAS").items()}
    said["tie_word_embeddings"] = not metadata.has("output.weight")
    if family.gguf.normalises is not None and "norm_topk_prob" in family.config.model_fields:
        said["norm_topk_prob"] = family.gguf.normalises
    said |= scaling_of(metadata, metadata.factors)
    said |= family.gguf.read(metadata)
    for name, key in _NAMES.items():
        said[f"{name}_token_id"] = header.fields.get(f"tokenizer.ggml.{key}_token_id")
    return {"architectures": [family.hf_architecture], "model_type": family.model_types[0], **said}


def _declared(family: Family, table: str) -> Mapping[str, str]:
    """What a family's schema and those that it is made of say."""
    found: dict[str, str] = {}
    for schema in reversed(family.config.__mro__):
        found |= vars(schema).get(table, {})
    return {name: key for name, key in found.items() if key}


def _factors(header: Header) -> dict[str, list[float]]:
    """Divisors of rotary frequencies that the file holds, by tensor."""
    import numpy as np

    found = {}
    for name in ROPE_FACTORS:
        if (stored := header.tensors.get(name)) is None:
            continue
        if stored.type != "F32":
            raise CheckpointError(f"{stored.file}: {name} is {stored.type}, not F32; fetch it again")
        with stored.file.open("rb") as file:
            file.seek(stored.span[0])
            found[name] = np.fromfile(file, "<f4", count=stored.shape[-1]).tolist()
    return found


def _require_same(metadata: Metadata, spec: ModelSpec) -> None:
    """What a writer would say of the model that was read is what the file says."""
    for key, ours in architecture_keys(spec, metadata.drafts).items():
        stored = metadata.fields.get(f"{metadata.arch}.{key}")
        if stored is not None and not same(stored, ours):
            raise UnsupportedModel(
                f"{metadata.path} says {metadata.arch}.{key} {_brief(stored)}, which this version cannot say of a "
                f"{spec.model_type} model (it would be {_brief(ours)}); use a file of another model, or the original folder"
            )


def _unread(metadata: Metadata, spec: ModelSpec) -> Iterator[str]:
    prefix = f"{metadata.arch}."
    known = {*architecture_keys(spec), *metadata.used, *_SILENT}
    if left := sorted(k for k in metadata.fields if k.startswith(prefix) and k.removeprefix(prefix) not in known):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        yield f"keys of the GGUF's metadata that are not read: {', '.join(map(shown, left[:3]))}{more}"


def _brief(value: Any) -> str:
    return in_words(value) if not isinstance(value, list | tuple) else shown(str(list(value)), 60)
