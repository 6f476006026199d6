"""Token perplexity and divergence from the original, with intervals over documents.

Every window of T tokens is scored on its own: position t (0 <= t <= T-2) predicts token t+1, and the last row of logits is
unused. Which tokens count, and whether windows overlap, is the text's protocol (`compress.text.protocol`). Perplexity is
per token; per word and per byte it is the same total divided by what the tokens spell, which makes models with other
tokenizers comparable. The three are never mixed.

Windows of one document are alike, and tokens of one window more so: all intervals are those of `compress.scoring.intervals`,
with documents as clusters. One document gives no interval (None). Quantiles of KL are point estimates.

Units: nats per token. KL is KL(reference || candidate), as in llama-perplexity --kl-divergence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from compress.errors import CalibrationError, CheckpointError, NumericalError
from compress.scoring.intervals import (
    Interval,
    exponential,
    mean_interval,
    paired_difference,
    paired_ratio,
    ratio_of_sums,
)
from compress.scoring.source import LogitSource, watched
from compress.text import EvalWindows

__all__ = [
    "Divergence", "Interval", "Scores", "TokenStats", "WindowStats", "exponential", "frequency_perplexity", "mean_interval",
    "paired_difference", "paired_ratio", "score", "score_many", "token_nll", "token_stats",
]  # fmt: skip

# Float64 working set per temporary array; a window of a 150k vocabulary is worked through in slices of rows.
CHUNK_ELEMENTS = 2**22

Progress = Callable[[float, int], None]


def frequency_perplexity(windows: EvalWindows | np.ndarray) -> float:
    """exp of the entropy of the counted tokens' frequencies, with Miller and Madow's correction for the few tokens that
    they were counted on: (kinds - 1) / 2 n nats (Miller 1955). windows: as of `score_many`."""
    windows = EvalWindows.of(windows)
    counted = [row[first:] for row, first in zip(windows.tokens, windows.first, strict=True)]
    counts = np.unique(np.concatenate(counted), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum())))


@dataclass(frozen=True)
class Divergence:
    """KL divergence from the reference in nats per token: mean with interval, then quantiles over tokens."""

    mean: float
    low: float | None
    high: float | None
    median: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Scores:
    """What one engine says about one model on fixed windows. Fields against a reference are None without one.

    perplexity, base_perplexity   exp of mean negative log-likelihood, candidate and reference
    perplexity_ratio              candidate / reference; paired, so far tighter than the two intervals suggest
    top1_agreement                share of positions where both rank the same token first
    tokens                        that count, in all: predicted and scored
    window_length, stride         tokens; windows of a smaller stride overlap
    tokenizer                     what made the windows;  engine: the source that gave the candidate's logits
    text_digest                   sha256 (16 hex) of the token ids and of which count: scores are comparable only if it is equal
    text, protocol                name of the set, and how it was made windows; see compress.text.protocol
    documents                     independent units behind every interval
    word_perplexity               exp of the total negative log-likelihood per whitespace-separated word
    byte_perplexity               the same per UTF-8 byte; base_...: the reference's. None where the text is not known
    kept_tokens                   of the reference at every place, see compress.scoring.kept; None: all
    """

    perplexity: Interval
    tokens: int
    windows: int
    window_length: int
    stride: int
    engine: str
    tokenizer: str
    text_digest: str
    base_perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    kld: Divergence | None = None
    top1_agreement: Interval | None = None
    text: str = ""
    protocol: str = "default"
    documents: int | None = None
    word_perplexity: Interval | None = None
    byte_perplexity: Interval | None = None
    base_word_perplexity: Interval | None = None
    base_byte_perplexity: Interval | None = None
    kept_tokens: int | None = None

    def of_reference(self, engine: str = "original") -> Scores:
        """The reference's own scores on the same windows (perplexity only); ValueError if there was none."""
        if self.base_perplexity is None:
            raise ValueError("these scores were made without a reference")
        return replace(
            self, perplexity=self.base_perplexity, engine=engine, base_perplexity=None, perplexity_ratio=None,
            kld=None, top1_agreement=None, word_perplexity=self.base_word_perplexity,
            byte_perplexity=self.base_byte_perplexity, base_word_perplexity=None, base_byte_perplexity=None, kept_tokens=None,
        )  # fmt: skip


@dataclass(frozen=True)
class WindowStats:
    """Window means, float64 [N] each; feed two of them, `documents` and `counts` to `paired_difference` or `paired_ratio`.

    nll, nll_ref in nats per token; kld in nats; same_top1 in [0, 1]. None without a reference. documents: integers [N];
    counts: tokens that count, [N].
    """

    nll: np.ndarray
    documents: np.ndarray
    counts: np.ndarray
    nll_ref: np.ndarray | None = None
    kld: np.ndarray | None = None
    same_top1: np.ndarray | None = None


@dataclass(frozen=True)
class TokenStats:
    """Per token, [T] each: nll_ref, nll_cand, kld float64 in nats, same_top1 bool."""

    nll_ref: np.ndarray
    nll_cand: np.ndarray
    kld: np.ndarray
    same_top1: np.ndarray


def token_stats(ref_logits: np.ndarray, cand_logits: np.ndarray, targets: np.ndarray) -> TokenStats:
    """Compare two models token by token, in float64.

    ref_logits, cand_logits: [T, V] finite floats, row t predicting targets[t]; targets: integers [T] in [0,
    V). KL is clipped at 0: its terms cancel to about 1e-15, so only rounding is removed. Ties for the first
    rank go to the lower token id.
    """
    rows, vocabulary = ref_logits.shape
    nll_ref, nll_cand, kld = np.empty(rows), np.empty(rows), np.empty(rows)
    same = np.empty(rows, bool)
    for part in row_slices(rows, vocabulary):
        reference, mass, log_mass = softmax_parts(ref_logits[part])
        candidate, _, log_mass_cand = softmax_parts(cand_logits[part])
        index = np.arange(len(reference)), np.asarray(targets[part])
        nll_ref[part] = log_mass - reference[index]
        nll_cand[part] = log_mass_cand - candidate[index]
        same[part] = reference.argmax(axis=1) == candidate.argmax(axis=1)
        # sum p (log p - log q) with log p = a - log A, log q = b - log B
        reference -= candidate
        expected_gap = np.einsum("tv,tv->t", mass, reference) / np.exp(log_mass)
        kld[part] = np.maximum(expected_gap - log_mass + log_mass_cand, 0.0)
    return TokenStats(nll_ref, nll_cand, kld, same)


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood in nats, float64 [T], of targets [T] under logits [T, V]."""
    out = np.empty(len(logits))
    for part in row_slices(*logits.shape):
        here = logits[part]
        out[part] = log_mass(here) - here[np.arange(len(here)), np.asarray(targets[part])]
    return out


def row_slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Rows of logits in pieces of CHUNK_ELEMENTS, one row at least."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def log_mass(logits: np.ndarray) -> np.ndarray:
    """log of the sum of exp of every row, float64 [T]. The exponentials are float32's, whose errors, random and below 2^-22,
    their sum of thousands averages out: to 1e-8 nats or so."""
    peak = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]


def softmax_parts(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits less their row maximum [T, V], the exponentials [T, V], log of their row sums [T]; float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    mass = np.exp(shifted)
    return shifted, mass, np.log(mass.sum(axis=1))


class WindowReference(Protocol):
    """What the original predicts in one window, in whatever form it is kept: logits, or what a cache has of them."""

    def compare(self, logits: np.ndarray, targets: np.ndarray) -> TokenStats:
        """A candidate's logits [n, V], row t predicting targets[t], beside the original's at the same places."""
        ...


class Reference(Protocol):
    """An original to compare with, window by window. source: what computes its logits; name, vocab_size: as of that."""

    @property
    def source(self) -> LogitSource: ...

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def windows(self, windows: EvalWindows) -> Iterator[WindowReference]:
        """Of each window in order, lazily: the places that count."""
        ...

    def kept(self, windows: EvalWindows) -> int | None:
        """Tokens of every place that it knows the probability of, None where of all."""
        ...


@dataclass(frozen=True)
class Logits:
    """A WindowReference that has all logits, float32 [n, V]."""

    rows: np.ndarray

    def compare(self, logits: np.ndarray, targets: np.ndarray) -> TokenStats:
        return token_stats(self.rows, logits, targets)


@dataclass(frozen=True)
class Computed:
    """A Reference that computes its logits anew."""

    source: LogitSource

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    def windows(self, windows: EvalWindows) -> Iterator[WindowReference]:
        return map(Logits, counted_rows(self.source, windows))

    def kept(self, windows: EvalWindows) -> int | None:
        return None


def counted_rows(source: LogitSource, windows: EvalWindows) -> Iterator[np.ndarray]:
    """Logits of each window that predict tokens that count, float32 [counts[i], V].

    Raises NumericalError for logits that are not finite or misshapen; names engine and window.
    """
    for number, (logits, first) in enumerate(zip(source.logits(list(windows.tokens)), windows.first, strict=True)):
        _check_logits(source, logits, number, windows.tokens.shape[1])
        yield logits[first - 1 : -1]


def score(
    reference: LogitSource | Reference | None,
    candidate: LogitSource,
    windows: EvalWindows | np.ndarray,
    *,
    tokenizer: str = "unknown",
    progress: Progress | None = None,
) -> tuple[Scores, WindowStats]:
    """Score one candidate; see `score_many`."""
    return score_many(reference, [candidate], windows, tokenizer=tokenizer, progress=progress)[0]


def score_many(
    reference: LogitSource | Reference | None,
    candidates: Sequence[LogitSource],
    windows: EvalWindows | np.ndarray,
    *,
    tokenizer: str = "unknown",
    progress: Progress | None = None,
) -> list[tuple[Scores, WindowStats]]:
    """Score several candidates in one pass over the reference.

    windows: of `eval_windows`, or any integers [N, T], which count as so many documents. One window's logits of each
    source are held at a time. Without a reference only perplexity is given. progress(done, total) is called with windows,
    and parts of them while a source works before its first. tokenizer is recorded, not used.

    Raises CalibrationError (no windows, ids beyond the vocabulary), CheckpointError (vocabularies differ),
    NumericalError (non-finite logits; names engine and window).
    """
    windows = EvalWindows.of(windows)
    original = Computed(reference) if isinstance(reference, LogitSource) else reference
    _check(
        windows.tokens, [(source.name, source.vocab_size) for source in (original, *candidates) if source is not None]
    )
    tokens: list[list[TokenStats | np.ndarray]] = [[] for _ in candidates]
    count = len(windows.tokens)
    kept: Iterable[WindowReference | None] = [None] * count if original is None else original.windows(windows)
    streams = zip(*(counted_rows(candidate, windows) for candidate in candidates), strict=True)
    sources = [*([] if original is None else [original.source]), *candidates]
    with watched(sources, lambda done: None if progress is None else progress(done * count, count)) as moved:
        for number, (before, arrays) in enumerate(zip(kept, streams, strict=True)):
            targets = windows.tokens[number, windows.first[number] :]
            for rows, found in zip(arrays, tokens, strict=True):
                found.append(token_nll(rows, targets) if before is None else before.compare(rows, targets))
            moved((number + 1) / count)
    results = []
    for candidate, found in zip(candidates, tokens, strict=True):
        scores, stats = summary(found, windows, engine=candidate.name, tokenizer=tokenizer)
        results.append((scores if original is None else replace(scores, kept_tokens=original.kept(windows)), stats))
    return results


def summary(
    parts: Sequence[TokenStats | np.ndarray], windows: EvalWindows, *, engine: str, tokenizer: str
) -> tuple[Scores, WindowStats]:
    """Scores of all windows from those of the tokens that count in each: TokenStats, or where there is no reference the
    negative log-likelihoods alone."""
    facts = _facts(windows, engine, tokenizer)
    compared = [part for part in parts if isinstance(part, TokenStats)]
    if not compared:
        own = _means(parts)
        return Scores(**_perplexities(own, windows), **facts), WindowStats(own, windows.documents, windows.counts)
    nll_ref, nll, kld, same = (
        [getattr(part, field) for part in compared] for field in ("nll_ref", "nll_cand", "kld", "same_top1")
    )
    own, original, lost, alike = (_means(values) for values in (nll, nll_ref, kld, same))
    clusters = windows.documents, windows.counts
    mean = mean_interval(lost, *clusters, low=0.0)
    tokens = np.concatenate(kld)
    median, p99, p999 = (float(x) for x in np.quantile(tokens, (0.5, 0.99, 0.999)))
    scores = Scores(
        **_perplexities(own, windows),
        **{f"base_{name}": value for name, value in _perplexities(original, windows).items()},
        perplexity_ratio=exponential(paired_difference(own, original, *clusters)),
        kld=Divergence(mean.value, mean.low, mean.high, median, p99, p999, float(tokens.max())),
        top1_agreement=mean_interval(alike, *clusters, low=0.0, high=1.0),
        **facts,
    )
    return scores, WindowStats(own, *clusters, original, lost, alike)


def _means(parts: Sequence[Any]) -> np.ndarray:
    """Of what every window has, float64 [N]."""
    return np.array([np.mean(part) for part in parts], np.float64)


def _perplexities(nll: np.ndarray, windows: EvalWindows) -> dict[str, Any]:
    """Intervals per token, word and byte (None where these are not known), from window means of the negative log-likelihood
    of a token [N]."""
    per = {"perplexity": windows.counts, "word_perplexity": windows.words, "byte_perplexity": windows.bytes}
    totals = nll * windows.counts
    return {
        name: exponential(ratio_of_sums(totals, counts, windows.documents, low=0.0))
        if counts is not None and counts.sum()
        else None
        for name, counts in per.items()
    }


def _facts(windows: EvalWindows, engine: str, tokenizer: str) -> dict[str, Any]:
    """What scores say about their windows."""
    count, length = windows.tokens.shape
    digest = hashlib.sha256(np.ascontiguousarray(windows.tokens, "<i8").tobytes() + f"{(count, length)}".encode())
    if (windows.first > 1).any():
        digest.update(np.ascontiguousarray(windows.first, "<i8").tobytes())
    protocol = windows.protocol
    return {
        "tokens": int(windows.counts.sum()),
        "windows": count,
        "window_length": length,
        "stride": length if protocol.stride is None else protocol.stride,
        "engine": engine,
        "tokenizer": tokenizer,
        "text_digest": digest.hexdigest()[:16],
        "text": windows.text,
        "protocol": str(protocol),
        "documents": len(np.unique(windows.documents)),
    }


def _check(windows: np.ndarray, sources: Sequence[tuple[str, int]]) -> None:
    """sources: their names and vocabularies."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"scoring needs windows of two tokens or more, got {windows.shape}; give more evaluation text"
        )
    if not np.issubdtype(windows.dtype, np.integer):
        raise CalibrationError(f"windows must hold integer token ids, not {windows.dtype}")
    sizes = {size for _, size in sources}
    if len(sizes) > 1:
        listing = ", ".join(f"{name}: {size}" for name, size in sources)
        raise CheckpointError(f"vocabularies differ ({listing}); compare a variant with its own original")
    top, bottom = int(windows.max()), int(windows.min())
    rows = min(sizes)
    if bottom < 0 or top >= rows:
        token = top if top >= rows else bottom
        raise CalibrationError(f"token id {token} is not in the model's vocabulary of {rows}; use its own tokenizer")


def _check_logits(source: LogitSource, logits: np.ndarray, number: int, length: int) -> None:
    if logits.shape != (length, source.vocab_size):
        raise NumericalError(
            f"{source.name} gave logits of shape {logits.shape} for window {number}, "
            f"expected {(length, source.vocab_size)}; report this as a bug"
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        position = int(np.argmin(finite))
        raise NumericalError(
            f"{source.name}: logits of window {number} are not finite from token {position} on; "
            "the weights are broken or overflow in this precision"
        )
