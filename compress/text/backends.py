"""What computes token ids: the package that wrote tokenizer.json, or SentencePiece for its own file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.errors import CheckpointError, MissingExtra
from compress.text.files import SENTENCEPIECE, TOKENIZER_JSON, TokenizerFiles

if TYPE_CHECKING:
    import tokenizers


class Backend(Protocol):
    """A tokenizer without its settings."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """All tokens and their ids, added ones, too."""
        ...

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def normalize(self, text: str) -> str:
        """A text as one that does not normalize has to be given it, to read the same."""
        ...


def open_backend(files: TokenizerFiles) -> Backend:
    """What a folder's files ask for. CheckpointError for a damaged file, MissingExtra without sentencepiece."""
    return Json.open(files.folder / TOKENIZER_JSON) if files.data else SentencePiece.open(files)


@dataclass(frozen=True)
class Json:
    """tokenizer.json as it is."""

    tokenizer: tokenizers.Tokenizer

    @classmethod
    def open(cls, path: Path) -> Json:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} cannot be read by tokenizers {tokenizers.__version__} ({line}); fetch it again"
            ) from None
        # what a training run may have left in the file: it would cut texts, fill them up, or split them at random
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            model = tokenizer.model
            model.dropout = None
            tokenizer.model = model
        return cls(tokenizer)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def normalize(self, text: str) -> str:
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)


@dataclass(frozen=True)
class SentencePiece:
    """SentencePiece's own file. What transformers adds to it: special tokens that a text writes out are found first, and
    the ends that the settings name."""

    processor: Any
    found: Mapping[str, int]
    """Texts that are one token wherever they stand."""
    ends: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def open(cls, files: TokenizerFiles) -> SentencePiece:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingExtra("sentencepiece", "sentencepiece", f"{files.folder / SENTENCEPIECE}") from error
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.Load(str(files.folder / SENTENCEPIECE))
        except (RuntimeError, OSError) as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{files.path} is no SentencePiece model ({line}); fetch it again") from None
        pieces = {processor.IdToPiece(index): index for index in range(processor.GetPieceSize())}
        found = {text: pieces[text] for text in files.special.values() if text in pieces}
        found |= {text: index for text, index in pieces.items() if processor.IsControl(index)}
        found |= {token.text: token.id for token in files.added}
        return cls(processor, found, sentencepiece_ends(files, {**pieces, **found}))

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        size = self.processor.GetPieceSize()
        return {**{self.processor.IdToPiece(index): index for index in range(size)}, **self.found}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted((text for text in self.found if text), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else "(?!)()")

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        before, behind = self.ends if add_special_tokens else ((), ())
        return [[*before, *self._ids(text), *behind] for text in texts]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part:
                ids += [self.found[part]] if part in self.found else self.processor.EncodeAsIds(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        texts = {index: text for text, index in self.found.items()}
        out, run = "", []
        for index in [*ids, -1]:
            if index >= 0 and index not in texts:
                run.append(index)
                continue
            out += self.processor.DecodeIds(run) if run else ""
            out, run = out + texts.get(index, ""), []
        return out

    def normalize(self, text: str) -> str:
        prefix = self.processor.Normalize("a").removesuffix("a")
        return str(self.processor.Normalize(text)).removeprefix(prefix).replace("▁", " ")


def sentencepiece_ends(files: TokenizerFiles, vocabulary: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and behind a text where only SentencePiece's file says what a token is: what tokenizer_config.json asks
    for, by default the beginning-of-text token alone, as Llama's tokenizer does."""
    ends = []
    for name, usual in (("bos", True), ("eos", False)):
        wanted = files.settings.get(f"add_{name}_token")
        index = vocabulary.get(files.special.get(name, ""))
        if index is None and not files.special and files.config_ids.get(name) in vocabulary.values():
            index = files.config_ids[name]
        ends.append((index,) if index is not None and (usual if wanted is None else bool(wanted)) else ())
    return ends[0], ends[1]
