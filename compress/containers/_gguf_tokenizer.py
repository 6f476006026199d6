"""A Hugging Face tokenizer as GGUF `tokenizer.*` keys.

Two kinds exist in llama.cpp for the supported families: byte-level BPE (`gpt2`) and SentencePiece BPE with byte
fallback (`llama`). What llama.cpp would tokenize differently is refused, never guessed.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, UnsupportedModel
from compress.models.gguf.pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from compress.text.backends import sentencepiece_ends
from compress.text.files import AddedToken, TokenizerFiles, read_files, steps
from compress.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import gguf

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_KEYS = {"unk": "unknown", "pad": "padding", "sep": "seperator"}
"""Names of special tokens in the file, where they are others."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer. `tokens` and `types` have one entry per row of the embedding."""

    model: str
    """"gpt2", "llama" or "none"."""
    pre: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    """bos, eos, unk, pad, ... -> id"""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    chat_template: str | tuple[Mapping[str, str], ...] | None = None


def read_vocabulary(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """The tokenizer of a Hugging Face model folder, one token for each of `vocab_size` rows of the embedding.

    Reads tokenizer.json, or SentencePiece's tokenizer.model when that is all there is; what it does is asked of the
    tokenizer itself, not of settings beside it. Added tokens without a row are left out. CheckpointError without either
    file or with other tokens than the embedding has rows; UnsupportedModel for a tokenizer llama.cpp has no equivalent of.
    """
    files = read_files(folder)
    # SentencePiece's own file is read here without its package
    tokenizer = load_tokenizer(folder, vocab_size) if files.data else None
    entries = _entries(files) if files.data else _sentencepiece_model(files.path)
    ids, added = _ids(files.added if tokenizer is None else tokenizer.added, entries, vocab_size)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    scores = [-10000.0] * vocab_size
    for index, text, kind, score in (*entries.pieces, *added):
        if index < vocab_size:
            if kind == _CONTROL and types[index] in (_UNKNOWN, _BYTE):
                kind = types[index]
            tokens[index], types[index], scores[index] = text, kind, score
    _require_one_id_each(tokens, files)
    special = _special(files, config, ids, vocab_size)
    before, behind = sentencepiece_ends(files, ids) if tokenizer is None else tokenizer.ends
    templates = files.chat_templates
    only = templates.get("default") if set(templates) <= {"default"} else None
    return Vocabulary(
        model=entries.model,
        pre=entries.pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores) if entries.model == "llama" else (),
        merges=entries.merges,
        special=special,
        add_bos="bos" in special and before[-1:] == (special["bos"],),
        add_eos="eos" in special and behind[:1] == (special["eos"],),
        add_space_prefix=entries.add_space_prefix,
        chat_template=only or tuple({"name": name, "template": text} for name, text in templates.items()) or None,
    )


@dataclass(frozen=True)
class _Entries:
    model: str
    pre: str
    pieces: tuple[tuple[int, str, int, float], ...]
    """(id, text, type, score)"""
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None


def _ids(
    found: Sequence[AddedToken], entries: _Entries, vocab_size: int
) -> tuple[dict[str, int], list[tuple[int, str, int, float]]]:
    """Ids of all tokens by the text that a model's folder knows them by, and the added ones as entries."""
    ids = {text: index for index, text, _, _ in entries.pieces}
    if len(ids) and max(ids.values()) >= vocab_size:
        index, text = max((index, text) for text, index in ids.items())
        raise CheckpointError(
            f"token {text!r} has id {index}, but the embedding has {vocab_size} rows; "
            "the tokenizer does not belong to this model"
        )
    added = []
    for token in found:
        control = token.special or _looks_special(token.text)
        text = token.text if control else token.text.replace("▁", " ")
        added.append((token.id, text, _CONTROL if control else _USER_DEFINED, -1000.0))
        ids[token.text] = token.id
    return ids, added


def _require_one_id_each(tokens: list[str], files: TokenizerFiles) -> None:
    if len(set(tokens)) < len(tokens):  # llama.cpp ends the process
        twice = next(text for text, count in Counter(tokens).items() if count > 1)
        raise UnsupportedModel(f"{files.path} has two tokens {twice!r}, which llama.cpp does not allow")


def _special(files: TokenizerFiles, config: Mapping[str, Any], ids: Mapping[str, int], rows: int) -> dict[str, int]:
    """bos, eos, unk, pad, ... by the names that the tokenizer's files give them, else by config.json's ids."""
    special = {name: ids[text] for name, text in files.special.items() if ids.get(text, rows) < rows}
    for name in ("bos", "eos", "unk", "pad"):
        value = config.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows:
            special.setdefault(name, value)
    return special


def _entries(files: TokenizerFiles) -> _Entries:
    """Of tokenizer.json. What splits text decides which of the two kinds it is: flags of the model do not."""
    kind = files.model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedModel(f"tokenizer type {kind!r} has no GGUF equivalent here (BPE only)")
    if any(step.get("type") == "ByteLevel" for step in steps(files.data.get("pre_tokenizer"), "pretokenizers")):
        return _bpe_bytes(files.data)
    if all(f"<0x{byte:02X}>" in files.vocabulary for byte in range(256)):
        return _bpe_sentencepiece(files.data)
    raise UnsupportedModel(
        "this tokenizer is neither byte-level nor has it SentencePiece's 256 pieces <0x00> to <0xFF>: "
        "llama.cpp could not spell every text"
    )


def _merges(model: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for merge in model.get("merges") or ():
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        pairs.append((left, right))
    return tuple(pairs)


def _bpe_bytes(data: Mapping[str, Any]) -> _Entries:
    model = data["model"]
    for step in steps(data.get("normalizer"), "normalizers"):
        # llama.cpp does not normalise; text is nearly always in NFC already
        if step["type"] != "NFC":
            raise UnsupportedModel(f"tokenizer normalizer {step['type']!r} has no equivalent in llama.cpp")
    pre = pre_tokenizer(data)
    if pre is None:
        known = ", ".join(sorted(pre.name for pre in PRE_TOKENIZERS))
        raise UnsupportedModel(f"this tokenizer's pre-tokenizer is unknown to the GGUF writer (known: {known})")
    pairs = _merges(model)
    if any(" " in part for pair in pairs for part in pair):
        raise UnsupportedModel("this tokenizer merges raw spaces, which GGUF cannot store")
    splits = steps(data.get("pre_tokenizer"), "pretokenizers")
    prefix = any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in splits)
    return _Entries(
        model="gpt2",
        pre=pre,
        add_space_prefix=True if prefix else None,  # llama.cpp knows the key, but not for this kind
        pieces=tuple((index, text, _NORMAL, 0.0) for text, index in model["vocab"].items()),
        merges=tuple(f"{left} {right}" for left, right in pairs),
    )


def _bpe_sentencepiece(data: Mapping[str, Any]) -> _Entries:
    """SentencePiece BPE converted to tokenizer.json: a token's score is minus the rank of its first merge."""
    model = data["model"]
    prefix = False
    for step in steps(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif not (step["type"] == "Replace" and step.get("content") == "▁" and step["pattern"].get("String") == " "):
            raise UnsupportedModel(f"tokenizer normalizer {step['type']!r} has no equivalent in llama.cpp")
    for step in steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("split", True) or step.get("replacement") != "▁":
            raise UnsupportedModel(f"tokenizer pre-tokenizer {step['type']!r} has no equivalent in llama.cpp")
        prefix = step.get("prepend_scheme", "always") in ("always", "first")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    pieces = []
    for text, index in model["vocab"].items():
        kind = _NORMAL
        if text == model.get("unk_token"):
            kind = _UNKNOWN
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = _BYTE
        pieces.append((index, text, kind, -float(ranks.get(text, len(ranks) + index)) if kind == _NORMAL else 0.0))
    return _Entries(model="llama", pre="default", pieces=tuple(pieces), add_space_prefix=prefix)


def _sentencepiece_model(path: Path) -> _Entries:
    """SentencePiece's own file, a protocol buffer: ModelProto{1: piece{1: text, 2: score, 3: type}, 2: trainer
    {3: model type}, 3: normalizer{3: add_dummy_prefix}} (sentencepiece_model.proto)."""
    pieces: list[tuple[int, str, int, float]] = []
    model_type, prefix = 1, True
    try:
        for number, value in _protobuf(path.read_bytes()):
            if number == 1:
                fields = dict(_protobuf(value))
                kind = fields.get(3, _NORMAL)
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append((len(pieces), fields[1].decode("utf-8"), kind, score))
            elif number == 2:
                model_type = dict(_protobuf(value)).get(3, model_type)
            elif number == 3:
                prefix = bool(dict(_protobuf(value)).get(3, True))
    except (IndexError, KeyError, ValueError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model; fetch it again") from error
    if model_type != 2:
        raise UnsupportedModel(f"{path.name} is not a BPE model; llama.cpp's SentencePiece tokenizer is BPE only")
    return _Entries(model="llama", pre="default", pieces=tuple(pieces), add_space_prefix=prefix)


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protocol-buffer message: ints for varints, bytes for the rest."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = data[position]
            position += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7

    while position < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        if wire not in (1, 2, 5) or position + size > len(data):
            raise ValueError("truncated protocol buffer")
        yield key >> 3, data[position : position + size]
        position += size


def _looks_special(text: str) -> bool:
    # some checkpoints do not mark their control tokens as special
    return text in ("<pad>", "<mask>") or (text[:2] in ("<|", "<｜") and text[-2:] in ("|>", "｜>"))


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Put the keys `tokenizer.*` into a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        template = vocabulary.chat_template
        writer.add_chat_template(template if isinstance(template, str) else list(template))


def vocabulary_bytes(source: Path) -> int:
    """About what the vocabulary takes in the file: lengths, texts and kinds of tokens, and merges. 0 where it cannot be
    read: the run itself will say what is wrong with it."""
    try:
        files = read_files(source)
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in files.model.get("merges") or ()]
        return sum(len(t.encode()) + 12 for t in files.vocabulary) + sum(len(p.encode()) + 8 for p in pairs)
    except (CheckpointError, KeyError, TypeError, IndexError, AttributeError):
        return 0
