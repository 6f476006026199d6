"""The tokenizer's files in a model folder: read once, checked, for everybody who needs one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SETTINGS = "tokenizer_config.json"
_OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "tiktoken.model", "tekken.json", "spiece.model")
_NAMES = ("bos", "eos", "unk", "pad", "sep", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before anything else is done to it."""

    id: int
    text: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def swallows(self) -> bool:
        """Whether it takes spaces beside it with it, or is not found inside words."""
        return self.lstrip or self.rstrip or self.single_word


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    data: tokenizer.json, empty where there is only SentencePiece's file; settings: tokenizer_config.json.
    """

    folder: Path
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """special_tokens_map.json, added_tokens.json, config.json, chat_template.json; empty where absent."""

    @property
    def model(self) -> Mapping[str, Any]:
        """The algorithm and its vocabulary, in tokenizer.json."""
        return self.data.get("model") or {}

    @property
    def path(self) -> Path:
        """The file that decides."""
        return self.folder / (TOKENIZER_JSON if self.data else SENTENCEPIECE)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Pieces of tokenizer.json and their ids, without added tokens."""
        vocabulary = self.model.get("vocab") or {}
        if isinstance(vocabulary, Mapping):
            return vocabulary
        return {piece[0]: index for index, piece in enumerate(vocabulary)}

    @cached_property
    def added(self) -> tuple[AddedToken, ...]:
        """Added tokens: those of tokenizer.json where there is one, else what the files beside it name. Where two have one
        id, or a piece has it already, the tokenizer itself gives others: see `Tokenizer.added`."""
        if self.data:
            found = [_added(token, token.get("id")) for token in _listed(self.data.get("added_tokens"))]
        else:
            found = [AddedToken(int(index), text) for text, index in self.others["added_tokens.json"].items()]
            decoder = self.settings.get("added_tokens_decoder")
            found += [_added(token, index) for index, token in decoder.items()] if isinstance(decoder, Mapping) else []
        return tuple(sorted({token.text: token for token in found}.values(), key=lambda token: token.id))

    @cached_property
    def special(self) -> Mapping[str, str]:
        """Texts of the special tokens: bos, eos, unk, pad, sep, mask, as far as they are named."""
        found: dict[str, str] = {}
        for source in (self.settings, self.others["special_tokens_map.json"]):
            for name in _NAMES:
                value = source.get(f"{name}_token")
                value = value.get("content") if isinstance(value, Mapping) else value
                if value is not None and not isinstance(value, str):
                    raise CheckpointError(f"{self.folder}: {name}_token is {value!r}, not a text; correct {SETTINGS}")
                if value is not None:
                    found.setdefault(name, value)
        return found

    @cached_property
    def foreign(self) -> tuple[str, ...]:
        """Tokens that the files beside tokenizer.json name and it does not have."""
        if not self.data:
            return ()
        named: list[Any] = [*self.special.values(), *self.others["added_tokens.json"]]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            named += _listed(self.settings.get(key))
        decoder = self.settings.get("added_tokens_decoder")
        tokens = decoder.values() if isinstance(decoder, Mapping) else ()
        named += [token.get("content") for token in tokens if isinstance(token, Mapping)]
        known = {*self.vocabulary, *(token.text for token in self.added)}
        return tuple(dict.fromkeys(text for text in named if isinstance(text, str) and text not in known))

    @cached_property
    def config_ids(self) -> Mapping[str, int]:
        """Ids of special tokens that config.json names, the first of a list."""
        found = {name: self.others["config.json"].get(f"{name}_token_id") for name in _NAMES}
        firsts = {name: value[0] if isinstance(value, list) and value else value for name, value in found.items()}
        return {name: v for name, v in firsts.items() if isinstance(v, int) and not isinstance(v, bool) and v >= 0}

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates by name; the one that is used unless another is asked for is "default"."""
        file = self.folder / "chat_template.jinja"
        more = {path.stem: _text(path) for path in sorted(self.folder.glob("additional_chat_templates/*.jinja"))}
        if file.is_file():
            return {"default": _text(file), **more}
        template = self.others["chat_template.json"].get("chat_template") or self.settings.get("chat_template")
        if isinstance(template, str):
            return {"default": template, **more}
        entries = [(e.get("name"), e.get("template")) for e in _listed(template) if isinstance(e, Mapping)]
        if template is not None and (not isinstance(template, list) or len(entries) != len(template)):
            raise CheckpointError(
                f"{self.folder}: chat_template is neither a text nor a list of them; correct {SETTINGS}"
            )
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in entries):
            raise CheckpointError(f"{self.folder}: a chat_template lacks its name or its text; correct {SETTINGS}")
        return {str(name): str(text) for name, text in entries} | more


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of a kind that is read here."""
    return any((folder / name).is_file() for name in (TOKENIZER_JSON, SENTENCEPIECE))


def read_files(folder: Path) -> TokenizerFiles:
    """The tokenizer's files of a model folder; those read last are kept. CheckpointError where there are none, or one is
    damaged."""
    return _read(Path(folder), _stamp(Path(folder)))


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a tokenizer's file does."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model", ".jinja") and file.is_file())
    return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)


@lru_cache(maxsize=2)
def _read(folder: Path, stamp: object) -> TokenizerFiles:
    if not has_tokenizer(folder):
        beside = [name for name in _OTHERS if (folder / name).is_file()]
        hint = f" ({', '.join(beside)} alone do not say how text is split)" if beside else ""
        raise CheckpointError(
            f"{folder} has no tokenizer: neither {TOKENIZER_JSON} nor SentencePiece's {SENTENCEPIECE}{hint}; "
            f"fetch {TOKENIZER_JSON} too"
        )
    names = ("special_tokens_map.json", "added_tokens.json", "config.json", "chat_template.json")
    files = TokenizerFiles(
        folder,
        _object(folder / TOKENIZER_JSON),
        _object(folder / SETTINGS),
        {name: _object(folder / name) for name in names},
    )
    if (folder / TOKENIZER_JSON).is_file() and not isinstance(files.data.get("model"), Mapping):
        raise CheckpointError(f"{folder / TOKENIZER_JSON} holds no tokenizer; fetch it again")
    return files


def _object(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); fetch it again")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _added(token: Any, index: Any) -> AddedToken:
    try:
        flags = {name: bool(token.get(name)) for name in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        text = token["content"]
        if not isinstance(text, str):
            raise TypeError
        return AddedToken(int(index), text, **flags)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"an added token of the tokenizer is damaged ({str(token)[:80]}); fetch it again"
        ) from None


def steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    """A component of tokenizer.json as a flat list."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part.get(key) or () for step in steps(inner, key)]
