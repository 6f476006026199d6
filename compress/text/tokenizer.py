"""The only place that makes a model folder a tokenizer: from tokenizer.json as it is, or from SentencePiece's own file.

No class of transformers is asked: what it makes of a label in tokenizer_config.json may be another tokenizer than the one
that the model was trained with. `text.agreement` says where it is. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from compress.errors import CheckpointError
from compress.text.backends import Backend, open_backend
from compress.text.files import AddedToken, TokenizerFiles, read_files, steps


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer: text to ids and back. Two are equal only if they are one: `load_tokenizer` keeps the last.

    rows: of the model's embedding, None where they are not known; no id of a text is allowed beyond them.
    """

    files: TokenizerFiles
    backend: Backend
    rows: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, by default with the special tokens that the tokenizer puts around one."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of several texts. CheckpointError where the tokenizer fails."""
        try:
            return self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # of the tokenizers package, which knows one type
            raise CheckpointError(f"{self.files.path} cannot read text ({error}); fetch it again") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out."""
        return self.backend.decode([int(index) for index in ids])

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return self.backend.vocabulary

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """By id."""
        return {index: text for text, index in self.vocabulary.items()}

    @cached_property
    def added(self) -> tuple[AddedToken, ...]:
        """Added tokens with the ids that they have, by id."""
        found = [replace(token, id=self.vocabulary.get(token.text, token.id)) for token in self.files.added]
        return tuple(sorted(found, key=lambda token: token.id))

    def as_read(self, text: str) -> str:
        """A text as an engine has to be given it that neither normalizes nor knows when a space is put in front."""
        splits = steps(self.files.data.get("pre_tokenizer"), "pretokenizers")
        text = self.backend.normalize(text)
        if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in splits):
            return text if text.startswith(" ") else f" {text}"
        if any(step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in splits):
            return text.removeprefix(" ")  # which is not put in front of one
        return text

    def token_id(self, name: str) -> int | None:
        """Id of a special token (bos, eos, unk, pad): the one that tokenizer_config.json names, config.json's where it
        names none at all. None where there is none."""
        special = self.files.special
        if not special:
            index = self.files.config_ids.get(name)
            return index if index in self.tokens else None
        return self.vocabulary.get(special[name]) if name in special else None

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id("bos")

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id("eos")

    @property
    def chat_template(self) -> str | None:
        """The template that talks are written in unless another is asked for."""
        return self.files.chat_templates.get("default")

    @property
    def template_tokens(self) -> Mapping[str, str]:
        """Texts of the special tokens, by their names in chat templates."""
        return {f"{name}_token": text for name, text in self.files.special.items()}

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of what stands for text that no token spells."""
        model = self.files.model
        if isinstance(index := model.get("unk_id"), int):
            return index
        text = model.get("unk_token") or self.files.special.get("unk")
        return self.vocabulary.get(text) if isinstance(text, str) else None

    @cached_property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that are put before and behind a text."""
        plain, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()

    @cached_property
    def beyond(self) -> Mapping[int, str]:
        """Tokens that the embedding has no row for."""
        return {} if self.rows is None else {i: text for i, text in sorted(self.tokens.items()) if i >= self.rows}


def load_tokenizer(folder: Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder. rows: of its embedding.

    CheckpointError where there is none, it is damaged, or belongs to a model with a larger vocabulary; MissingExtra
    where it is SentencePiece's file and that package is not installed.
    """
    return _loaded(read_files(Path(folder)), rows)


@lru_cache(maxsize=2)
def _loaded(files: TokenizerFiles, rows: int | None) -> Tokenizer:
    tokenizer = Tokenizer(files, open_backend(files), rows)
    added = {token.text for token in tokenizer.added}
    foreign = [
        (i, text) for text, i in tokenizer.vocabulary.items() if rows is not None and i >= rows and text not in added
    ]
    if foreign:
        index, text = min(foreign)
        raise CheckpointError(
            f"token {text!r} has id {index}, but the embedding has {rows} rows; "
            f"{files.path} does not belong to this model"
        )
    return tokenizer
