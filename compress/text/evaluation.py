"""Windows of text to score: spread over the whole of it, each with its document, and what of it counts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from compress.errors import CalibrationError
from compress.text.documents import articles, load_documents, stamp
from compress.text.protocol import DEFAULT, Protocol
from compress.text.sets import TextSet, find_data, load_definition
from compress.text.tokenizer import Tokenizer
from compress.text.windows import TOKENIZE_TOGETHER, check_ids, check_sizes, prepends_bos, too_few

SEED = 20
"""Of the draw; fixed, so that every variant of a model is scored on the same windows."""
BLOCK_TOKENS = 2048
"""Consecutive tokens that stand for a document where a text has none: about 8 kB of English, four windows of 512."""
READ_CHARACTERS = 2**23
"""Of a larger text only the beginning is read, unless more windows than it has are asked for."""
CHARACTERS_A_TOKEN = 16  # at most, on average
ANCHOR_TOKENS = 64  # how often a place in the text is known exactly
CONTEXT_TOKENS = 8  # enough to see whether a word or a character has begun before


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Windows of one text and what of them counts.

    tokens      int32 [N, T]
    first       int [N]: from this index on the tokens of a window count; 1 or more, as nothing predicts the first
    documents   int [N]: the document that most of the tokens that count belong to; the cluster of every interval
    words       int [N]: whitespace-separated words that begin in the tokens that count; None: not known
    bytes       int [N]: UTF-8 bytes of the characters that end in them, special tokens aside; None: not known
    text        name of the set, never where it lies
    """

    tokens: np.ndarray
    first: np.ndarray
    documents: np.ndarray
    words: np.ndarray | None = None
    bytes: np.ndarray | None = None
    text: str = ""
    protocol: Protocol = DEFAULT

    @classmethod
    def of(cls, windows: EvalWindows | np.ndarray) -> EvalWindows:
        """Any windows, integers [N, T]: each a document of its own, all tokens but the first count."""
        if isinstance(windows, EvalWindows):
            return windows
        tokens = np.asarray(windows)
        length = tokens.shape[1] if tokens.ndim == 2 else 0
        count = len(tokens) if tokens.ndim else 0
        return cls(tokens, np.ones(count, int), np.arange(count), protocol=Protocol(length=length))

    @property
    def counts(self) -> np.ndarray:
        """Tokens of every window that count, int [N]."""
        return self.tokens.shape[1] - self.first


@dataclass(frozen=True, eq=False)
class Packed:
    """A text as one run of tokens. ids: int32 [n]; documents: int [n], the document of every token."""

    ids: np.ndarray
    documents: np.ndarray


def eval_windows(
    name: str,
    tokenizer: Tokenizer,
    *,
    windows: int | None = None,
    length: int | None = None,
    protocol: Protocol = DEFAULT,
    max_positions: int | None = None,
) -> EvalWindows:
    """Windows of an evaluation text, in its order; every full one if `windows` is None.

    The text is packed as the protocol says and cut into all its windows; the run of these is cut into `windows` equal parts,
    and one is drawn from each: the same ones for the same set, tokenizer and numbers. Documents are those of the
    set, articles where it is in WikiText's format, and blocks of BLOCK_TOKENS where it is a single one. length: the
    protocol's, unless given.

    Raises:
        CalibrationError: as `calibration_windows`.
    """
    protocol = protocol if length is None else replace(protocol, length=length)
    check_sizes(1 if windows is None else windows, protocol.length, max_positions, "windows")
    starts_with_bos = prepends_bos(tokenizer)
    before = [tokenizer.bos_token_id] if starts_with_bos and protocol.bos == "before" else []
    width = protocol.length - len(before)
    step = width if protocol.stride is None else min(protocol.stride, width)
    definition = load_definition(find_data("eval", name))
    packed = _packed(name, definition, tokenizer, protocol, ((windows or 1) - 1) * step + width)
    count = (len(packed.ids) - width) // step + 1 if len(packed.ids) >= width else 0
    if len(packed.ids) == 0:
        raise CalibrationError(f"evaluation set '{name}' holds no text")
    if count < (windows or 1):
        raise CalibrationError(too_few("evaluation set", name, len(packed.ids), windows or 1, width, "windows"))
    starts = _drawn(count, windows or count, definition.name) * step
    places = starts[:, None] + np.arange(width)
    tokens = np.concatenate([np.tile(np.asarray(before, np.int32), (len(starts), 1)), packed.ids[places]], axis=1)
    tokens = tokens.astype(np.int32)
    if starts_with_bos and protocol.bos == "in place":
        tokens[:, 0] = tokenizer.bos_token_id
    first = np.where(starts == 0, 1, max(1, protocol.length - step))
    if protocol.counted == "second half":
        if protocol.length < 3:
            raise CalibrationError(
                "the second half of a window of 2 tokens is none that counts; set length to 3 or more"
            )
        first = np.maximum(first, protocol.length // 2 + 1)
    documents = [_most(packed.documents[row[start - len(before) :]]) for row, start in zip(places, first, strict=True)]
    sizes = np.array(
        [
            _sizes(packed.ids, start - len(before) + skipped, start + width, tokenizer)
            for start, skipped in zip(starts, first, strict=True)
        ]
    )
    return EvalWindows(tokens, first, np.array(documents), sizes[:, 0], sizes[:, 1], definition.name, protocol)


def _drawn(count: int, wanted: int, name: str) -> np.ndarray:
    """One of every `wanted` equal parts of range(count), int [wanted], ascending."""
    edges = np.arange(wanted + 1) * count // wanted
    return np.random.default_rng([SEED, zlib.crc32(name.encode())]).integers(edges[:-1], edges[1:])


def _most(labels: np.ndarray) -> int:
    values, counts = np.unique(labels, return_counts=True)
    return int(values[counts.argmax()])


def _packed(name: str, definition: TextSet, tokenizer: Tokenizer, protocol: Protocol, wanted: int) -> Packed:
    """The text in tokens, read once a process. wanted: tokens that are needed at least."""
    characters = max(READ_CHARACTERS, CHARACTERS_A_TOKEN * wanted)
    return _read(name, stamp(definition), tokenizer, _Packing.of(protocol), characters)


@dataclass(frozen=True)
class _Packing:
    """What of a protocol decides how a text is packed."""

    joiner: str
    starts_with_bos: bool
    as_file: bool

    @classmethod
    def of(cls, protocol: Protocol) -> _Packing:
        return cls(protocol.joiner, protocol.bos == "in place", protocol.as_file)


@lru_cache(maxsize=4)
def _read(name: str, stamp: tuple, tokenizer: Tokenizer, packing: _Packing, characters: int) -> Packed:
    definition = load_definition(find_data("eval", name))
    documents: list[str] = []
    for document in load_documents(definition, as_file=packing.as_file):
        documents.append(document)
        if (characters := characters - len(document)) <= 0:
            break
    if packing.joiner == "end of text":
        texts, begin = documents, [articles(definition, document) for document in documents]
    else:
        joiner = "\n\n" if packing.joiner == "blank line" else ""
        ends = np.cumsum([0, *(len(document) + len(joiner) for document in documents)])
        begin = [[int(e) + b for e, d in zip(ends, documents, strict=False) for b in articles(definition, d)]]
        texts = [joiner.join(documents)] if documents else []
    packed = _pack(texts, begin, tokenizer, packing)
    check_ids(packed.ids, tokenizer, f"evaluation set '{name}'")
    return packed


def _pack(texts: Sequence[str], begin: Sequence[list[int]], tokenizer: Tokenizer, packing: _Packing) -> Packed:
    """begin: of every text, where its documents begin, in characters."""
    end = [tokenizer.eos_token_id] if packing.joiner == "end of text" and tokenizer.eos_token_id is not None else []
    start = [tokenizer.bos_token_id] if packing.starts_with_bos and prepends_bos(tokenizer) else []
    ids, labels, known = [np.empty(0, np.int32)], [np.empty(0, int)], 0
    for at in range(0, len(texts), TOKENIZE_TOGETHER):
        batch = texts[at : at + TOKENIZE_TOGETHER]
        for text, places, row in zip(
            batch,
            begin[at : at + TOKENIZE_TOGETHER],
            tokenizer.encode_batch(batch, add_special_tokens=False),
            strict=True,
        ):
            ids.append(np.asarray([*(start if known == 0 else []), *row, *end], np.int32))
            labels.append(known + _document_of_tokens(ids[-1], text, places, tokenizer))
            known += len(places)
    tokens, documents = np.concatenate(ids), np.concatenate(labels)
    return Packed(tokens, documents if known > 1 else np.arange(len(tokens)) // BLOCK_TOKENS)


def _document_of_tokens(ids: np.ndarray, text: str, begin: list[int], tokenizer: Tokenizer) -> np.ndarray:
    """Number of the document that every token of a text lies in, int [n], known to a token or two: places in the text are
    those of decoded tokens, interpolated. begin: where the documents begin, in characters."""
    if len(begin) == 1:
        return np.zeros(len(ids), int)
    anchors = np.append(np.arange(0, len(ids), ANCHOR_TOKENS), len(ids))
    written = np.cumsum([0, *(len(tokenizer.decode(ids[a:b])) for a, b in pairwise(anchors))])
    places = np.interp(np.arange(len(ids)) + 0.5, anchors, written * (len(text) / max(written[-1], 1)))
    return np.searchsorted(begin, places, side="right") - 1


def _sizes(ids: np.ndarray, start: int, end: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Words that begin and bytes of characters that end in ids[start:end]: what is written up to there, less what is written
    up to the start."""
    ids, start = ids[max(start - CONTEXT_TOKENS, 0) : end], min(start, CONTEXT_TOKENS)
    words, size = _written(ids, tokenizer)
    words_before, size_before = _written(ids[:start], tokenizer)
    return words - words_before, size - size_before


def _written(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Whitespace-separated words and UTF-8 bytes of the text between special tokens; a character that is cut at either
    end of it is left out."""
    special = [index for index in (tokenizer.bos_token_id, tokenizer.eos_token_id) if index is not None]
    words = size = 0
    for piece in np.split(ids, np.flatnonzero(np.isin(ids, special))):
        text = tokenizer.decode(piece[~np.isin(piece, special)]).strip("\ufffd")
        words, size = words + len(text.split()), size + len(text.encode())
    return words, size
