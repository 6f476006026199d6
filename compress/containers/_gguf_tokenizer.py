"""A Hugging Face tokenizer as GGUF `tokenizer.*` keys.

Two kinds exist in llama.cpp for the supported families: byte-level BPE (`gpt2`) and SentencePiece BPE with byte
fallback (`llama`). What llama.cpp would tokenize differently is refused, never guessed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import OutputError, UnsupportedModel

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (structure of the pre-tokenizer, merges ignored for whole-word tokens) -> tokenizer.ggml.pre
_PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    (f"split:{_QWEN2} bytes", False): "qwen2",
    (f"split:{_LLAMA3} bytes", True): "llama-bpe",
    (f"split:{_LLAMA3} bytes", False): "smaug-bpe",
    (f"split:{_TEKKEN} bytes", True): "tekken",
    ("bytes+regex", False): "gpt-2",
    ("digits bytes+regex", False): "smollm",
}


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
    """The tokenizer of a Hugging Face model folder.

    Reads tokenizer.json, or SentencePiece's tokenizer.model when that is all there is. OutputError without either or
    with more tokens than the embedding has rows; UnsupportedModel for a tokenizer llama.cpp has no equivalent of.
    """
    settings = _json(folder / "tokenizer_config.json")
    special_names = _special_names(folder, settings)
    if (folder / "tokenizer.json").is_file():
        data = _json(folder / "tokenizer.json")
        model = data.get("model") or {}
        if model.get("type", "BPE") != "BPE":
            raise UnsupportedModel(f"tokenizer type {model['type']!r} has no GGUF equivalent here (BPE only)")
        entries = _bpe_sentencepiece(data) if model.get("byte_fallback") else _bpe_bytes(data)
    elif (folder / "tokenizer.model").is_file():
        data = {}
        entries = _sentencepiece_model(folder / "tokenizer.model")
    else:
        raise OutputError(f"no tokenizer.json or tokenizer.model in {folder}; a GGUF file needs the tokenizer")

    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    scores = [-10000.0] * vocab_size
    ids: dict[str, int] = {}
    for index, text, kind, score in (*entries.pieces, *_added_tokens(folder, data, settings)):
        if index >= vocab_size:
            raise OutputError(
                f"token {text!r} has id {index} but the embedding has {vocab_size} rows; "
                "the tokenizer does not belong to this model"
            )
        if kind == _CONTROL and types[index] in (_UNKNOWN, _BYTE):
            kind = types[index]
        tokens[index], types[index], scores[index] = text, kind, score
        ids[text] = index

    special = {name: ids[text] for name, text in special_names.items() if text in ids}
    for name in ("bos", "eos", "unk", "pad"):
        value = config.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < vocab_size:
            special.setdefault(name, value)
    add_bos, add_eos = _added_at_ends(data, settings, ids, special, entries.model)
    return Vocabulary(
        model=entries.model,
        pre=entries.pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores) if entries.model == "llama" else (),
        merges=entries.merges,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=entries.add_space_prefix,
        chat_template=_chat_template(folder, settings),
    )


@dataclass(frozen=True)
class _Entries:
    model: str
    pre: str
    pieces: tuple[tuple[int, str, int, float], ...]
    """(id, text, type, score)"""
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is not valid JSON: {error}") from error


def _merges(model: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for merge in model.get("merges") or ():
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        pairs.append((left, right))
    return tuple(pairs)


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A tokenizer.json component as a flat list."""
    if not part:
        return []
    return list(part.get(key) or ()) if part.get("type") == "Sequence" else [part]


def _bpe_bytes(data: Mapping[str, Any]) -> _Entries:
    model = data["model"]
    for step in _steps(data.get("normalizer"), "normalizers"):
        # llama.cpp does not normalise; text is nearly always in NFC already
        if step["type"] != "NFC":
            raise UnsupportedModel(f"tokenizer normalizer {step['type']!r} has no equivalent in llama.cpp")
    structure = " ".join(_pre_token(step) for step in _steps(data.get("pre_tokenizer"), "pretokenizers"))
    pre = _PRE_TOKENIZERS.get((structure, bool(model.get("ignore_merges"))))
    if pre is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS.values()))
        raise UnsupportedModel(f"this tokenizer's pre-tokenizer is unknown to the GGUF writer (known: {known})")
    pairs = _merges(model)
    if any(" " in part for pair in pairs for part in pair):
        raise UnsupportedModel("this tokenizer merges raw spaces, which GGUF cannot store")
    return _Entries(
        model="gpt2",
        pre=pre,
        pieces=tuple((index, text, _NORMAL, 0.0) for text, index in model["vocab"].items()),
        merges=tuple(f"{left} {right}" for left, right in pairs),
    )


def _pre_token(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"split:{step['pattern'].get('Regex')}"
    if kind == "Split" and step.get("behavior") == "Removed" and step.get("invert"):
        return f"split:{step['pattern'].get('Regex')}"  # keeps the matches: the same pieces
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes+regex" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    return f"unknown:{kind}"


def _bpe_sentencepiece(data: Mapping[str, Any]) -> _Entries:
    """SentencePiece BPE converted to tokenizer.json: a token's score is minus the rank of its first merge."""
    model = data["model"]
    prefix = False
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif not (step["type"] == "Replace" and step.get("content") == "▁" and step["pattern"].get("String") == " "):
            raise UnsupportedModel(f"tokenizer normalizer {step['type']!r} has no equivalent in llama.cpp")
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
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
        raise OutputError(f"{path} is not a SentencePiece model; download it again") from error
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


def _added_tokens(
    folder: Path, data: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[int, str, int, float]]:
    listed: dict[int, tuple[str, bool]] = {}
    for text, index in _json(folder / "added_tokens.json").items():
        listed[int(index)] = (text, False)
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        listed[int(index)] = (token["content"], bool(token.get("special")))
    for token in data.get("added_tokens") or ():
        listed[int(token["id"])] = (token["content"], bool(token.get("special")))
    for index, (text, special) in sorted(listed.items()):
        control = special or _looks_special(text)
        yield (
            index,
            text if control else text.replace("▁", " "),
            _CONTROL if control else _USER_DEFINED,
            -1000.0,
        )


def _special_names(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad", "sep": "seperator", "mask": "mask"}
    found: dict[str, str] = {}
    for source in (settings, _json(folder / "special_tokens_map.json")):
        for short, name in keys.items():
            value = source.get(f"{short}_token")
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                found.setdefault(name, value)
    return found


def _added_at_ends(
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
    special: Mapping[str, int],
    model: str,
) -> tuple[bool, bool]:
    """Whether encoding puts BOS before and EOS after a text."""
    # LlamaTokenizer without a post-processor or a setting adds BOS
    bos, eos = model == "llama" and not data, False
    for processor in _steps(data.get("post_processor"), "processors"):
        if processor.get("type") == "TemplateProcessing":
            ends = [next(iter(step.items())) for step in processor.get("single") or ()]
            names = [ids.get(value["id"]) if kind == "SpecialToken" else None for kind, value in ends]
            bos = bool(names) and names[0] is not None and names[0] == special.get("bos")
            eos = len(names) > 1 and names[-1] is not None and names[-1] == special.get("eos")
    for name, value in (("bos", settings.get("add_bos_token")), ("eos", settings.get("add_eos_token"))):
        if isinstance(value, bool):
            bos, eos = (value, eos) if name == "bos" else (bos, value)
    return bos and "bos" in special, eos and "eos" in special


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | tuple[Mapping[str, str], ...] | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):
        return tuple({"name": entry["name"], "template": entry["template"]} for entry in template)
    return template


def vocabulary_bytes(source: Path) -> int:
    """About what the vocabulary takes in the file: lengths, texts and kinds of tokens, and merges. 0 where it cannot be
    read: the run itself will say what is wrong with it."""
    try:
        model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        tokens, merges = model.get("vocab") or (), model.get("merges") or ()
        texts = [token if isinstance(token, str) else token[0] for token in tokens]
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return 0
    return sum(len(t.encode()) + 12 for t in texts) + sum(len(p.encode()) + 8 for p in pairs)
