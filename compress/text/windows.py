"""Token windows of calibration text, and what all windows are held against; those that are scored are in `evaluation`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from compress.errors import CalibrationError
from compress.text.documents import Reading, read_documents
from compress.text.hub import Progress
from compress.text.sources import TextSource, text_set, told
from compress.text.talks import Document, Speaker
from compress.text.tokenizer import Tokenizer

TOKENIZE_TOGETHER = 16
UNKNOWN_AT_MOST = 0.5
"""Share of a text that may be the unknown token; more says nothing about the model."""


# -------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """Windows of text. ids: int32 [samples, length]; lines: what deserves one of how the text was read."""

    ids: np.ndarray
    lines: tuple[str, ...] = ()


def calibration_windows(
    text: TextSource | str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    max_positions: int | None = None,
) -> np.ndarray:
    """The windows of `calibration_text` alone, int32 [samples, length]."""
    found = calibration_text(text, tokenizer, samples=samples, length=length, seed=seed, max_positions=max_positions)
    return found.ids


def calibration_text(
    text: TextSource | str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    max_positions: int | None = None,
    progress: Progress | None = None,
) -> CalibrationText:
    """Token ids of calibration text. text: the name of a set alone, or all that a recipe says of it.

    Documents are shuffled by `seed`, tokenized without special tokens, each followed by the end-of-text token
    (where the tokenizer has one, and the chat template has not written it), and packed into full windows: no padding, and
    the same arguments give the same array. Fewer samples with the same seed are a prefix of more.

    Raises:
        CalibrationError: no such set, no text, too few tokens, windows longer than `max_positions`, a token that the
            embedding has no row for, or mostly text that the tokenizer does not know.
    """
    check_sizes(samples, length, max_positions, "samples")
    source = TextSource(text) if isinstance(text, str) else text
    definition = text_set(source)
    reading = Reading(Speaker.of(tokenizer, source.template), progress)
    wanted, name = samples * length, source.label
    found: list[np.ndarray] = []
    count = 0
    for piece in _pieces(read_documents(definition, reading, seed=seed), tokenizer):
        found.append(piece)
        count += len(piece)
        if progress is not None:
            progress(min(1.0, count / wanted), f"tokens of {name}")
        if count >= wanted:
            break
    tokens = np.concatenate(found)[:wanted] if found else np.empty(0, dtype=np.int32)
    if len(tokens) == 0:
        raise CalibrationError(f"calibration set '{name}' holds no text")
    ended = " and ".join(f"'{told(part)}'" for part in reading.ended)
    if len(tokens) < wanted:
        why = f"; it ends with its part {ended}" if ended and definition.ends == "first" else ""
        raise CalibrationError(too_few("calibration set", name, len(tokens), samples, length, "samples") + why)
    check_ids(tokens, tokenizer, f"calibration set '{name}'")
    lines = [*definition.notes, *reading.speaker.lines()]
    if ended and definition.ends == "last":
        lines.append(f"{ended} of '{name}' has no more text: the other parts go on alone")
    if source.template and not reading.speaker.done["talks"]:
        lines.append(f"template: true changes nothing: '{name}' holds texts, no talks")
    return CalibrationText(tokens.reshape(samples, length), tuple(lines))


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


def _pieces(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of documents, int32 [n], each closed by the end-of-text token unless its chat template has done so."""
    end = tokenizer.eos_token_id
    while batch := list(islice(documents, TOKENIZE_TOGETHER)):
        encoded = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        for document, ids in zip(batch, encoded, strict=True):
            closed = end is None or (document.rendered and end in ids)
            yield np.asarray(ids if closed else [*ids, end], dtype=np.int32)


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
