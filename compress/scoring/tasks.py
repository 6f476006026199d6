"""Task accuracy through lm-eval, offline, on bundled slices, over any LogitSource.

One adapter turns a LogitSource into an lm-eval model, so the original (streamed), a decoded model and a GGUF
inside llama.cpp answer the very same requests. Tokenizing, prompts, truncation and metrics are lm-eval's own
(0.4.13).

Intervals, 95%: accuracy has Wilson's score interval over documents; word perplexity exp of a Student t
interval over documents; differences between two models are paired by document.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import CalibrationError, MissingExtra, NumericalError, RecipeError
from compress.scoring.divergence import Progress, exponential, mean_interval, token_nll
from compress.scoring.source import LogitSource

# Task name -> field of a document that names its group, reported as "<task>.<group>".
TASKS: Mapping[str, str | None] = {"blimp": "linguistics_term", "lambada": None}
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Outcomes:
    """Per-document results of one task: documents' indices in the bundled file [n], correct bool [n],
    groups (one name per document, or None), log_likelihood of the target in nats float64 [n] (or None)."""

    documents: np.ndarray
    correct: np.ndarray
    groups: tuple[str, ...] | None = None
    log_likelihood: np.ndarray | None = None


def run_tasks(
    source: LogitSource,
    tokenizer: Any,
    tasks: Mapping[str, int],
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Score `source` on bundled tasks: {name: {"metric", "value", "low", "high", "n"}}.

    tasks maps "blimp" or "lambada" to the number of documents (the first so many of the file, whose BLiMP
    rows go round the 67 paradigms; 0: all). Extra rows: "blimp.<phenomenon>" and "lambada.perplexity". The
    other arguments and the errors are those of `task_outcomes`.
    """
    return summarise(task_outcomes(source, tokenizer, tasks, max_length=max_length, progress=progress))


def task_outcomes(
    source: LogitSource,
    tokenizer: Any,
    tasks: Mapping[str, int],
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcomes]:
    """Answer every document of the tasks in one lazy pass over `source`.

    tokenizer   the original's, also when a GGUF answers; one of transformers will do
    max_length  tokens the model can see; longer requests lose their beginning, as lm-eval does
    progress    called with (sequences done, sequences)

    Never touches the network. Raises MissingExtra (lm-eval), RecipeError (unknown task), CalibrationError (a
    token id outside the vocabulary), NumericalError (non-finite logits).
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise RecipeError(f"unknown task {unknown[0]!r}; bundled tasks are: {', '.join(TASKS)}")
    if not tasks:
        return {}
    model = logit_source_lm(source, tokenizer, max_length=max_length, progress=progress)
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from compress.text import data_root

    with _quiet():
        manager = TaskManager(include_path=str(data_root("eval") / "tasks"), include_defaults=False)
        loaded = manager.load(list(tasks))
        chosen = {}
        for name, wanted in tasks.items():
            available = len(loaded["tasks"][name].eval_docs)
            chosen[name] = list(range(min(wanted, available) if wanted > 0 else available))
        results = evaluate(model, loaded, samples=chosen, bootstrap_iters=0, log_samples=True)
    return {name: _outcomes(results["samples"][name], TASKS[name]) for name in tasks}


def load_documents(name: str, **_: Any) -> dict[str, Any]:
    """A task's bundled documents as lm-eval wants them ({"test": Dataset}); called from eval/tasks/*.yaml."""
    from datasets import Dataset

    from compress.text import task_documents

    return {"test": Dataset.from_list(list(task_documents(name)))}


def summarise(outcomes: Mapping[str, Outcomes]) -> dict[str, dict[str, Any]]:
    """Outcomes as plain rows {name: {"metric", "value", "low", "high", "n"}}; see `run_tasks`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, result in outcomes.items():
        rows[name] = _accuracy(result.correct)
        if result.log_likelihood is not None:
            perplexity = exponential(mean_interval(-result.log_likelihood))
            rows[f"{name}.perplexity"] = {
                "metric": "word perplexity",
                **vars(perplexity),
                "n": len(result.correct),
            }
        for group in sorted(set(result.groups or ())):
            member = np.array([entry == group for entry in result.groups or ()])
            rows[f"{name}.{group}"] = _accuracy(result.correct[member])
    return rows


def compare(candidate: Outcomes, reference: Outcomes) -> dict[str, Any]:
    """Accuracy of the candidate less that of the reference on the same documents, paired.

    Returns {"metric", "value", "low", "high", "n"}. The interval is Agresti and Min's adjusted Wald interval
    for matched pairs (half a document added to each cell), which stays honest when few or no answers differ.
    """
    if not np.array_equal(candidate.documents, reference.documents):
        raise ValueError("task results to compare must come from the same documents")
    count = len(candidate.correct)
    gained = int(np.sum(candidate.correct & ~reference.correct))
    lost = int(np.sum(~candidate.correct & reference.correct))
    total, plus, minus = count + 2, gained + 0.5, lost + 0.5
    middle = (plus - minus) / total
    half = _Z * math.sqrt(plus + minus - (plus - minus) ** 2 / total) / total
    return {
        "metric": "accuracy difference", "value": (gained - lost) / count,
        "low": max(middle - half, -1.0), "high": min(middle + half, 1.0), "n": count,
    }  # fmt: skip


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a proportion; count > 0."""
    share, z2 = successes / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # at 0 and at `count` successes the bound is exactly 0 and 1; rounding must not step past the estimate
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def logit_source_lm(
    source: LogitSource, tokenizer: Any, *, max_length: int | None = None, progress: Progress | None = None
) -> Any:
    """An lm_eval.api.model.LM (a `LogitSourceLM`) that answers `loglikelihood` from a LogitSource.

    All requests of one call become one lazy pass, longest first, each distinct token sequence scored once.
    Raises MissingExtra without lm-eval.
    """
    return _adapter()(source, tokenizer, max_length, progress)


@functools.cache
def _adapter() -> Callable[..., Any]:
    """The adapter class; built late because its base class lives in an optional package."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise MissingExtra("lm-eval", "eval", "Task accuracy") from error

    class LogitSourceLM(TemplateLM):
        def __init__(self, source: LogitSource, tokenizer: Any, max_length: int | None, progress: Progress | None):
            super().__init__()
            self.source, self.tokenizer = source, tokenizer
            self.max_length, self.progress = max_length, progress

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            """What an empty context becomes: BOS, or EOS for tokenizers without one, as in lm-eval's HFLM."""
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            # A text that already starts with BOS must not get a second one.
            if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                special = {"add_special_tokens": False}
            return self.tokenizer.encode(string, **special)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return answer(self.source, pairs, max_length=self.max_length, progress=self.progress)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            raise NotImplementedError("perplexity is scored by compress.scoring.divergence")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            raise NotImplementedError("a LogitSource does not generate; use a likelihood task")

    return LogitSourceLM


def answer(
    source: LogitSource,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is it the greedy continuation) for each (context ids, continuation ids) pair.

    Both parts hold at least one id. Sequences run through `source` longest first, so that running out of
    memory shows at once and equal lengths stand together for batching.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        tokens = tuple(context) + tuple(continuation)
        if max(tokens) >= source.vocab_size:
            raise CalibrationError(
                f"token id {max(tokens)} is outside {source.name}'s vocabulary of {source.vocab_size}; "
                "use the model's own tokenizer"
            )
        if max_length is not None:
            if len(continuation) > max_length:
                raise CalibrationError(f"a task answer of {len(continuation)} tokens exceeds the limit of {max_length}")
            tokens = tokens[-(max_length + 1) :]
        inputs.setdefault(tokens[:-1], []).append(index)  # the last token is predicted, never read
    order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    stream = source.logits([np.asarray(tokens, np.int64) for tokens in order])
    for done, (tokens, logits) in enumerate(zip(order, stream, strict=True)):
        for index in inputs[tokens]:
            wanted = np.asarray(pairs[index][1])
            rows = logits[-len(wanted) :]
            if not np.isfinite(rows).all():
                raise NumericalError(
                    f"{source.name}: logits of task request {index} are not finite; "
                    "the weights are broken or overflow in this precision"
                )
            greedy = bool((rows.argmax(axis=1) == wanted).all())
            results[index] = (-float(token_nll(rows, wanted).sum()), greedy)
        if progress is not None:
            progress(done + 1, len(order))
    return results


def _outcomes(samples: Sequence[Mapping[str, Any]], group: str | None) -> Outcomes:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    likelihood = [sample["perplexity"] for sample in samples if "perplexity" in sample]
    return Outcomes(
        documents=np.array([sample["doc_id"] for sample in samples]),
        correct=np.array([bool(sample["acc"]) for sample in samples]),
        groups=tuple(str(sample["doc"][group]) for sample in samples) if group else None,
        log_likelihood=np.array(likelihood, np.float64) if likelihood else None,
    )


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    low, high = wilson(int(correct.sum()), len(correct))
    return {"metric": "acc", "value": float(correct.mean()), "low": low, "high": high, "n": len(correct)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its warnings and its progress bar; what it reports is in our own results."""
    import lm_eval.api.task as task_module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
