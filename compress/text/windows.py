"""Token windows of calibration text, and what all windows are held against; those that are scored are in `evaluation`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from compress.errors import CalibrationError
from compress.text.documents import load_documents
from compress.text.sets import find_data, load_definition
from compress.text.tokenizer import Tokenizer

TOKENIZE_TOGETHER = 16
UNKNOWN_AT_MOST = 0.5
"""Share of a text that may be the unknown token; more says nothing about the model."""


# -------------------------------------------------------------------------------------------- windows


def calibration_windows(
    name: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    max_positions: int | None = None,
) -> np.ndarray:
    """Token ids of calibration text, int32 [samples, length].

    Documents are shuffled by `seed`, tokenized without special tokens, each followed by the end-of-text token
    (where the tokenizer has one), and packed into full windows: no padding, and the same arguments give the
    same array. Fewer samples with the same seed are a prefix of more.

    Raises:
        CalibrationError: no such set, no text, too few tokens, windows longer than `max_positions`, a token that the
            embedding has no row for, or mostly text that the tokenizer does not know.
    """
    check_sizes(samples, length, max_positions, "samples")
    definition = load_definition(find_data("calibration", name))
    documents = load_documents(definition, seed=seed)
    tokens = _tokens(documents, tokenizer, samples * length)
    if len(tokens) == 0:
        raise CalibrationError(f"calibration set '{name}' holds no text")
    if len(tokens) < samples * length:
        raise CalibrationError(too_few("calibration set", name, len(tokens), samples, length, "samples"))
    check_ids(tokens, tokenizer, f"calibration set '{name}'")
    return tokens.reshape(samples, length)


def prepends_bos(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer puts its beginning-of-text token before a text unless told otherwise."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def check_ids(ids: np.ndarray, tokenizer: Tokenizer, what: str) -> None:
    """CalibrationError for ids, int [n], that the model cannot read, or that are mostly the unknown token."""
    rows = tokenizer.rows
    if rows is not None and len(ids) and (worst := int(ids.max())) >= rows:
        raise CalibrationError(
            f"{what} holds the token {tokenizer.tokens.get(worst, '?')!r} (id {worst}), but the model's embedding has "
            f"{rows} rows; take it out of the text, or use the model's own tokenizer"
        )
    unknown = tokenizer.unknown_id
    if unknown is not None and len(ids) and (share := float((ids == unknown).mean())) > UNKNOWN_AT_MOST:
        raise CalibrationError(
            f"{share:.0%} of {what} is {tokenizer.tokens.get(unknown, '?')!r}, text that the tokenizer does not know; "
            "use other text, or the model's own tokenizer"
        )


def _tokens(documents: Iterator[str], tokenizer: Tokenizer, wanted: int | None) -> np.ndarray:
    """Ids of `documents`, each closed by the end-of-text token; int32, cut at `wanted` (None: all)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    count = 0
    while (wanted is None or count < wanted) and (batch := list(islice(documents, TOKENIZE_TOGETHER))):
        for ids in tokenizer.encode_batch(batch, add_special_tokens=False):
            pieces.append(np.asarray([*ids, *end], dtype=np.int32))
            count += len(pieces[-1])
    return np.concatenate(pieces)[:wanted] if pieces else np.empty(0, dtype=np.int32)


def check_sizes(count: int, length: int, max_positions: int | None, what: str) -> None:
    """CalibrationError for sizes that make no windows, or longer ones than the model reads."""
    if count < 1 or length < 2:
        raise CalibrationError(f"{what} must be at least 1 and length at least 2, not {count} and {length}")
    if max_positions is not None and length > max_positions:
        limit = f"the {max_positions} positions of the model"
        raise CalibrationError(f"length {length} is more than {limit}; set length to at most {max_positions}")


def too_few(what: str, name: str, tokens: int, count: int, length: int, field_name: str) -> str:
    """What is missing and what would do, in words."""
    fit = tokens // length
    fix = f"set {field_name} to at most {fit}" if fit else f"set length to at most {tokens}"
    need = f"{count} {field_name if count > 1 else 'window'} of {length} need {count * length:,}"
    return f"{what} '{name}' has {tokens:,} tokens, but {need}; {fix}, or use another set"
