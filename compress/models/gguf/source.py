"""A GGUF file as the model folder that it was made from: configuration, tokenizer and card written out, tensors decoded when
they are read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import __version__
from compress.errors import CheckpointError
from compress.files import cache_folder, checksum, kept_folder
from compress.models.gguf.config import config_of
from compress.models.gguf.header import Header, read_set
from compress.models.gguf.tensors import QUANTIZED, Decoded, entries_of, unclaimed
from compress.models.gguf.tokenizer import tokenizer_files
from compress.models.index import FLOAT_CODEC
from compress.models.sources import already_quantized, shares
from compress.models.spec import ModelSpec
from compress.reading import shown

_FORM = 1  # of what is written out: another number, other folders
_SUFFIXES = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")
_TYPE = re.compile(r"(?:[-._](?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|FP16|F32|MXFP4\w*|NVFP4\w*))+$", re.IGNORECASE)
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_CARD = (
    ("license", "license"), ("license_name", "license.name"), ("license_link", "license.link"), ("language", "languages"),
    ("tags", "tags"),
)  # fmt: skip
"""Keys of a card, and of general.* metadata."""


@dataclass(frozen=True)
class Source:
    """folder: config.json, tokenizer and card as in Hugging Face's layout; entries: the tensors; notes: what to say of it."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Decoded]
    notes: tuple[str, ...]


def open_source(path: Path) -> Source:
    """A GGUF file, or any of a split set, as a model.

    Raises CheckpointError where it is damaged or no whole model, UnsupportedModel where architecture or tokenizer are of another
    kind than those that are read, OutputError where nothing can be written into the cache.
    """
    header = read_set(path)
    config, spec, notes = config_of(header)
    entries = dict(entries_of(spec, header))
    entries |= _beside(spec, header)
    weights = _weights(spec, entries)
    ((own, _),) = weights.most_common(1)
    config["dtype"] = _DTYPES[FLOAT_CODEC.get(own, QUANTIZED)]
    name = model_name(path)
    written = json.dumps(config, indent=2) + "\n"
    key = checksum(f"{_FORM} {__version__} {header.digest} {written}".encode())[:32]

    def files() -> Mapping[str, bytes]:
        texts = tokenizer_files(header.fields, str(path), spec.vocab_size, spec.max_positions)
        texts["config.json"] = written
        texts["README.md"] = _card(header, path)
        return {file: text.encode() for file, text in texts.items()}

    folder = kept_folder(cache_folder("gguf") / key / name, files)
    quantized = sum(entries[tensor.name].quantized for tensor in spec.tensors())
    told = [already_quantized(shares(weights, quantized))] if quantized else []
    return Source(folder, config, entries, (*told, *notes))


def model_name(path: Path) -> str:
    """The model's name by its file's, without number and type: SmolLM2-135M-Instruct.Q4_1.gguf is SmolLM2-135M-Instruct."""
    name = _SUFFIXES.sub("", Path(path).name)
    return _TYPE.sub("", name) or name or "model"


def _beside(spec: ModelSpec, header: Header) -> dict[str, Decoded]:
    """What drafts further tokens, behind the model's blocks. Raises CheckpointError for all else that is no part of the model:
    it would compute something else."""
    found = {}
    drafts = header.fields.get(f"{spec.gguf_arch}.nextn_predict_layers", 0)
    behind = range(spec.layers, spec.layers + drafts) if isinstance(drafts, int) else ()
    for name, file in unclaimed(spec, header).items():
        block = re.match(r"blk\.(\d{1,9})\.", name)
        if block is None or int(block[1]) not in behind:
            raise CheckpointError(
                f"{file} holds {shown(name)}, which its metadata does not imply and {spec.model_type} models do not have; it "
                "cannot be read as a model"
            )
        stored = header.tensors[name]
        found[f"mtp.{name}"] = Decoded(file, stored.type, stored.shape, span=stored.span)
    return found


def _weights(spec: ModelSpec, entries: Mapping[str, Decoded]) -> Counter[str]:
    """Weights of every type."""
    found: Counter[str] = Counter()
    for tensor in spec.tensors():
        for part in entries[tensor.name].parts:
            found[part.stored.type] += tensor.parameters // len(entries[tensor.name].parts)
    return found


def _card(header: Header, path: Path) -> str:
    """A card that says what is known of the model."""
    import yaml

    said = {name: header.fields.get(f"general.{key}") for name, key in _CARD}
    front = yaml.safe_dump({k: v for k, v in said.items() if v}, sort_keys=False, allow_unicode=True)
    title = header.fields.get("general.name")
    known = f", which calls the model {shown(title)}" if isinstance(title, str) else ""
    return f"---\n{front}---\n\nThis model was read from the GGUF file `{shown(Path(path).name)}`{known}.\n"
