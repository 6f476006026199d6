"""Token perplexity and divergence from the original, with intervals that respect correlated tokens.

Every window of T tokens is scored on its own: position t (0 <= t <= T-2) predicts token t+1, windows do not
overlap (stride = T), and the last row of logits is unused. This is token perplexity, never word perplexity.

Tokens inside a window are alike, so a standard error over tokens is too small (llama-perplexity's is up to
1.5x too small). All intervals here are 95% Student t intervals over window means, N-1 degrees of freedom,
which is the cluster-robust interval for clusters of one size. One window gives no interval (None).

Units: nats per token. KL is KL(reference || candidate), as in llama-perplexity --kl-divergence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import CalibrationError, CheckpointError, NumericalError
from compress.scoring.source import LogitSource

CONFIDENCE = 0.95
# Float64 working set per temporary array; a window of a 150k vocabulary is worked through in slices of rows.
CHUNK_ELEMENTS = 2**22

Progress = Callable[[int, int], None]


def frequency_perplexity(windows: np.ndarray) -> float:
    """exp of the entropy of the predicted tokens' frequencies, with Miller and Madow's correction for the few tokens that
    they were counted on: (kinds - 1) / 2 n nats (Miller 1955). windows: [windows, length] token ids."""
    counts = np.unique(windows[:, 1:], return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum())))


@dataclass(frozen=True)
class Interval:
    """A point estimate and its 95% interval; low and high are None when one window allows none."""

    value: float
    low: float | None = None
    high: float | None = None


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
    tokens                        predicted tokens in all: windows * (window_length - 1)
    window_length, stride         tokens; stride equals window_length
    tokenizer                     what made the windows;  engine: the source that gave the candidate's logits
    text_digest                   sha256 (16 hex) of the token ids: scores are comparable only if it is equal
    text, protocol                name of the text set; how its windows were made and which tokens count
    documents                     independent units behind every interval
    word_perplexity, byte_perplexity   exp of the negative log-likelihood per word and per UTF-8 byte of the scored text
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

    def of_reference(self, engine: str = "original") -> Scores:
        """The reference's own scores on the same windows (perplexity only); ValueError if there was none."""
        if self.base_perplexity is None:
            raise ValueError("these scores were made without a reference")
        return replace(
            self, perplexity=self.base_perplexity, engine=engine, base_perplexity=None, perplexity_ratio=None,
            kld=None, top1_agreement=None,
        )  # fmt: skip


@dataclass(frozen=True)
class WindowStats:
    """Window means, float64 [N] each; feed two of them to `paired_difference` or `paired_ratio`.

    nll, nll_ref in nats per token; kld in nats; same_top1 in [0, 1]. None without a reference.
    """

    nll: np.ndarray
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
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        reference, mass, log_mass = _softmax_parts(ref_logits[part])
        candidate, _, log_mass_cand = _softmax_parts(cand_logits[part])
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
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        part = slice(start, min(start + step, len(logits)))
        shifted, _, log_mass = _softmax_parts(logits[part])
        out[part] = log_mass - shifted[np.arange(len(shifted)), np.asarray(targets[part])]
    return out


def _softmax_parts(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits less their row maximum [T, V], the exponentials [T, V], log of their row sums [T]; float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    mass = np.exp(shifted)
    return shifted, mass, np.log(mass.sum(axis=1))


def mean_interval(window_means: np.ndarray, low: float = -math.inf, high: float = math.inf) -> Interval:
    """Mean of [N] window means with its t interval, cut to the range [low, high] the quantity can take."""
    values = np.asarray(window_means, np.float64)
    mean = float(values.mean())
    half = _half_width(values)
    if half is None:
        return Interval(mean)
    return Interval(mean, max(mean - half, low), min(mean + half, high))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """Mean of a - b over the same windows ([N] window means each), with the paired interval."""
    return mean_interval(_paired(a, b, np.subtract))


def paired_ratio(a: np.ndarray, b: np.ndarray) -> Interval:
    """mean(a) / mean(b) over the same windows ([N] positive window means each), with a paired interval.

    The interval is exp(log ratio +- t * se), with se by the delta method: var of a/mean(a) - b/mean(b).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    relative = _paired(a / a.mean(), b / b.mean(), np.subtract)
    ratio = float(a.mean() / b.mean())
    half = _half_width(relative)
    if half is None:
        return Interval(ratio)
    return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def _paired(a: np.ndarray, b: np.ndarray, operation: np.ufunc) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same windows, got {a.shape} and {b.shape}")
    return operation(a, b)


def _half_width(values: np.ndarray) -> float | None:
    """Half the 95% t interval of a mean of independent values [N]; None for one value."""
    count = len(values)
    if count < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))


def exponential(interval: Interval) -> Interval:
    """The interval of exp(x) given that of x; a perplexity beyond float64 is infinite."""
    low, high = (None if x is None else _exp(x) for x in (interval.low, interval.high))
    return Interval(_exp(interval.value), low, high)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def score(
    reference: LogitSource | None,
    candidate: LogitSource,
    windows: np.ndarray,
    *,
    tokenizer: str = "unknown",
    progress: Progress | None = None,
) -> tuple[Scores, WindowStats]:
    """Score one candidate on token windows [N, T]; see `score_many`."""
    return score_many(reference, [candidate], windows, tokenizer=tokenizer, progress=progress)[0]


def score_many(
    reference: LogitSource | None,
    candidates: Sequence[LogitSource],
    windows: np.ndarray,
    *,
    tokenizer: str = "unknown",
    progress: Progress | None = None,
) -> list[tuple[Scores, WindowStats]]:
    """Score several candidates on token windows [N, T] (integers) in one pass over the reference.

    One window's logits of each source are held at a time. Without a reference only perplexity is given.
    progress(done, total) is called after each window. tokenizer is recorded, not used.

    Raises CalibrationError (no windows, ids beyond the vocabulary), CheckpointError (vocabularies differ),
    NumericalError (non-finite logits; names engine and window).
    """
    windows = np.asarray(windows)
    sources = [*([reference] if reference is not None else []), *candidates]
    _check(windows, sources)
    count, length = windows.shape
    tokens: list[list[TokenStats]] = [[] for _ in candidates]
    alone: list[list[np.ndarray]] = [[] for _ in candidates]
    streams = zip(*(source.logits(list(windows)) for source in sources), strict=True)
    for number, (window, arrays) in enumerate(zip(windows, streams, strict=True)):
        for source, array in zip(sources, arrays, strict=True):
            _check_logits(source, array, number, length)
        for index in range(len(candidates)):
            targets = window[1:]
            if reference is None:
                alone[index].append(token_nll(arrays[index][:-1], targets))
            else:
                tokens[index].append(token_stats(arrays[0][:-1], arrays[index + 1][:-1], targets))
        if progress is not None:
            progress(number + 1, count)

    digest = hashlib.sha256(np.ascontiguousarray(windows, dtype="<i8").tobytes() + f"{windows.shape}".encode())
    results = []
    for index, candidate in enumerate(candidates):
        facts = {
            "tokens": count * (length - 1), "windows": count, "window_length": length, "stride": length,
            "engine": candidate.name, "tokenizer": tokenizer, "text_digest": digest.hexdigest()[:16],
        }  # fmt: skip
        if reference is None:
            nll = np.stack(alone[index]).mean(axis=1)
            results.append((Scores(exponential(mean_interval(nll)), **facts), WindowStats(nll)))
        else:
            results.append(_summary(tokens[index], facts))
    return results


def _summary(parts: list[TokenStats], facts: dict) -> tuple[Scores, WindowStats]:
    nll_ref, nll, kld, same = (
        np.stack([getattr(part, field) for part in parts]) for field in ("nll_ref", "nll_cand", "kld", "same_top1")
    )
    own, original, lost, alike = (values.mean(axis=1) for values in (nll, nll_ref, kld, same))
    mean = mean_interval(lost, low=0.0)
    median, p99, p999 = (float(x) for x in np.quantile(kld, (0.5, 0.99, 0.999)))
    scores = Scores(
        perplexity=exponential(mean_interval(own)),
        base_perplexity=exponential(mean_interval(original)),
        perplexity_ratio=exponential(paired_difference(own, original)),
        kld=Divergence(mean.value, mean.low, mean.high, median, p99, p999, float(kld.max())),
        top1_agreement=mean_interval(alike, low=0.0, high=1.0),
        **facts,
    )
    return scores, WindowStats(own, original, lost, alike)


def _check(windows: np.ndarray, sources: Sequence[LogitSource]) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"scoring needs windows of two tokens or more, got {windows.shape}; give more evaluation text"
        )
    if not np.issubdtype(windows.dtype, np.integer):
        raise CalibrationError(f"windows must hold integer token ids, not {windows.dtype}")
    sizes = {source.vocab_size for source in sources}
    if len(sizes) > 1:
        listing = ", ".join(f"{source.name}: {source.vocab_size}" for source in sources)
        raise CheckpointError(f"vocabularies differ ({listing}); compare a variant with its own original")
    top, bottom = int(windows.max()), int(windows.min())
    if bottom < 0 or top >= min(sizes):
        token = top if top >= min(sizes) else bottom
        raise CalibrationError(
            f"token id {token} is not in the model's vocabulary of {min(sizes)}; use its own tokenizer"
        )


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
