"""A GGUF's `tokenizer.*` metadata as the files of a model folder: tokenizer.json and its settings, chat templates.

Ids are those of llama.cpp (src/llama-vocab.cpp) on the same file: what it does to text and what it does not, its defaults
where a file does not say. Two of its kinds are read: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.errors import CheckpointError, UnsupportedModel
from compress.models.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer, components, named
from compress.reading import in_words, shown
from compress.text.files import SETTINGS, TOKENIZER_JSON

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""gguf.TokenType"""
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Names of special tokens in settings, and in a file."""
_USUAL = {"llama": {"bos": 1, "eos": 2, "unk": 0}}
"""llama.cpp's ids where a file names none."""
_ENDS = ("eot", "eom")
"""Further tokens that end a turn."""
_FILLED = re.compile(r"\[PAD\d+\]")  # rows without a token
_SPACE = "▁"


def tokenizer_files(fields: Mapping[str, Any], path: str, rows: int, length: int) -> dict[str, str]:
    """Name -> text of the files of a model folder that `fields`, the metadata of the file `path`, make; none where it holds no
    tokenizer. rows: of the embedding; length: the model's positions.

    Raises UnsupportedModel for a tokenizer of another kind, CheckpointError for one that is damaged.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return {}
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{path}: its tokenizer is {in_words(kind)}; those of models read from GGUF are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE)"
        )
    vocabulary = _Vocabulary(fields, path, kind, rows)
    files = {TOKENIZER_JSON: vocabulary.tokenizer(), SETTINGS: vocabulary.settings(length)}
    ends = [vocabulary.ids.get("eos"), *(fields.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS)]
    ends = list(dict.fromkeys(index for index in ends if vocabulary.is_id(index)))
    generation = {
        "bos_token_id": vocabulary.ids.get("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": vocabulary.ids.get("pad"),
    }
    files["generation_config.json"] = {k: v for k, v in generation.items() if v is not None}
    texts = {name: json.dumps(data, ensure_ascii=False, indent=2) + "\n" for name, data in files.items()}
    return texts | dict(_templates(fields, path))


def _templates(fields: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    key = "tokenizer.chat_template"
    listed = fields.get(f"{key}s")
    for name in (None, *(listed if isinstance(listed, list) else ())):
        text = fields.get(key if name is None else f"{key}.{name}")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-]{1,64}", name)):
            raise CheckpointError(f"{path}: {in_words(name)} is no name of a chat template; fetch it again")
        if isinstance(text, str):
            yield "chat_template.jinja" if name is None else f"additional_chat_templates/{name}.jinja", text


class _Vocabulary:
    """The lists of a vocabulary, checked, and what tokenizer.json says of them."""

    def __init__(self, fields: Mapping[str, Any], path: str, kind: str, rows: int):
        self.fields, self.path, self.kind, self.rows = fields, path, kind, rows
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int, len(self.tokens)) or [NORMAL] * len(self.tokens)
        if not self.tokens or len(self.tokens) > rows:
            raise CheckpointError(
                f"{path} has {len(self.tokens)} tokens for the {rows} rows of its embedding; fetch it again"
            )
        known = {token: index for index, token in enumerate(self.tokens) if not self._filled(index)}
        self.vocabulary = known
        if len(known) < sum(not self._filled(index) for index in range(len(self.tokens))):
            raise CheckpointError(f"{path} has two tokens of one text; fetch it again")
        named_ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMES.items()}
        usual = {n: i for n, i in _USUAL.get(kind, {}).items() if self.is_id(i) and self.types[i] in (CONTROL, UNKNOWN)}
        found: dict[str, Any] = {**usual, **{name: index for name, index in named_ids.items() if index is not None}}
        self.ids: dict[str, int] = {name: index for name, index in found.items() if self.is_id(index)}

    def _list(self, key: str, type: type, size: int | None = None) -> list[Any]:
        """A list of metadata, empty where there is none. Raises CheckpointError for another length or another type."""
        found = self.fields.get(f"tokenizer.ggml.{key}", [])
        good = isinstance(found, list) and all(isinstance(one, type) for one in found)
        if not good or (found and size is not None and len(found) != size):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key} is damaged; fetch it again")
        return list(found)

    def _filled(self, index: int) -> bool:
        return self.types[index] == UNUSED and _FILLED.fullmatch(self.tokens[index]) is not None

    def is_id(self, index: Any) -> bool:
        return isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(self.tokens)

    # -- tokenizer.json
    def tokenizer(self) -> dict[str, Any]:
        pre = self._pre() if self.kind == "gpt2" else None
        parts = self._sentencepiece() if pre is None else self._bytes(pre)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            "normalizer": parts["normalizer"],
            "pre_tokenizer": parts["pre_tokenizer"],
            "post_processor": self._around(pre),
            "decoder": parts["decoder"],
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                **parts["model"],
                "vocab": self.vocabulary,
            },
        }

    def _pre(self) -> PreTokenizer:
        name = self.fields.get("tokenizer.ggml.pre", "default")
        found = named(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(sorted(pre.name for pre in PRE_TOKENIZERS))
            raise UnsupportedModel(
                f"{self.path}: its pre-tokenizer {in_words(name)} is not known here, so that text would be split otherwise than "
                f"in llama.cpp (known: {known})"
            )
        return found

    def _added(self) -> Iterator[dict[str, Any]]:
        """What llama.cpp finds in a text before anything else."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for index, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) and text:
                yield {"id": index, "content": text, **flags, "special": kind != USER_DEFINED}

    def _around(self, pre: PreTokenizer | None) -> dict[str, Any] | None:
        """What is put around a text."""
        usual = {"bos": pre is None or pre.adds_bos, "eos": False}
        ends: list[list[str]] = []
        for name in ("bos", "eos"):
            adds = self.fields.get(f"tokenizer.ggml.add_{name}_token", usual[name])
            ends.append([name] if adds is True and name in self.ids else [])
        if not any(ends):
            return None

        def tokens(names: Sequence[str]) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": self.tokens[self.ids[name]], "type_id": 0}} for name in names]

        def text(letter: str, number: int) -> dict[str, Any]:
            return {"Sequence": {"id": letter, "type_id": number}}

        before, behind = map(tokens, ends)
        used = {self.tokens[self.ids[name]]: self.ids[name] for names in ends for name in names}
        return {
            "type": "TemplateProcessing",
            "single": [*before, text("A", 0), *behind],
            "pair": [*before, text("A", 0), *behind, *before, text("B", 1), *behind],
            "special_tokens": {t: {"id": t, "ids": [index], "tokens": [t]} for t, index in used.items()},
        }

    def _bytes(self, pre: PreTokenizer) -> dict[str, Any]:
        merges: list[list[str]] = []
        for merge in self._list("merges", str):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not {left, right, left + right} <= self.vocabulary.keys():
                raise CheckpointError(
                    f"{self.path}: {shown(merge, 40)!r} merges no tokens of its vocabulary; fetch it again"
                )
            merges.append([left, right])
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": components(pre)},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"ignore_merges": pre.ignores_merges, "merges": merges},
        }

    def _sentencepiece(self) -> dict[str, Any]:
        prefix = self.fields.get("tokenizer.ggml.add_space_prefix", True) is True
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.tokens[self.ids["unk"]] if "unk" in self.ids else None
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "merges": self._pairs()},
        }

    def _pairs(self) -> list[list[str]]:
        """All pairs of pieces that make a piece, those of the best score first, as SentencePiece's BPE merges them."""
        scores: list[float] = self._list("scores", float, len(self.tokens))
        if not scores:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.scores is missing; fetch it again")
        pieces = {t: i for t, i in self.vocabulary.items() if self.types[i] in (NORMAL, USER_DEFINED, UNUSED)}
        found = [
            (-scores[index], -cut, text)
            for text, index in pieces.items()
            for cut in range(1, len(text))
            if text[:cut] in pieces and text[cut:] in pieces
        ]
        return [[text[:-cut], text[-cut:]] for _, cut, text in sorted(found)]

    # -- beside it
    def settings(self, length: int) -> dict[str, Any]:
        special = {f"{name}_token": self.tokens[index] for name, index in self.ids.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": length,
        }
