"""Asks a model a suite's tasks: one lazy pass over all requests, answers by document."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from compress.scoring.results import Fallback
from compress.scoring.source import LogitSource, generator
from compress.scoring.tasks.adapter import logit_source_lm
from compress.scoring.tasks.load import FEWSHOT_SEED, AskedTask, declared, not_scored
from compress.scoring.tasks.outcomes import PERPLEXITY, Outcomes

PREFERRED = ("acc", "exact_match")  # what stands for a task that does not say


def task_outcomes(
    source: LogitSource,
    tokenizer: Any,
    asked: Sequence[AskedTask],
    *,
    max_length: int | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[dict[str, Outcomes], list[Fallback]]:
    """Answer every document of the tasks: outcomes by name, and a line for each task that this source cannot answer, or
    answers otherwise than asked. A group whose tasks have one headline metric is one task; else each stands for itself.

    tokenizer   the original's, also when a GGUF answers; one of transformers will do where no chat template is asked for
    max_length  tokens the model can see; longer requests lose their beginning, as lm-eval does
    progress    called with the share that is done

    Raises CalibrationError (a token id outside the vocabulary), NumericalError (non-finite logits), CheckpointError (a
    chat template that fails), MissingExtra (lm-eval).
    """
    if not asked:
        return {}, []
    engine = generator(source) if any(task.generates for task in asked) else None
    able = [task for task in asked if engine is not None or not task.generates]
    template = _has_template(tokenizer)
    lines = [*_ungenerated(source, asked, able), *([] if template else _plain(able))]
    forms = {chat: [task for task in able if (task.choice.chat and template) is chat] for chat in (False, True)}
    meter = _Meter(
        progress, {(chat, kind): work for chat, tasks in forms.items() for kind, work in _work(tasks).items()}
    )
    outcomes: dict[str, dict[str, Outcomes]] = {}
    for chat, tasks in forms.items():
        model = logit_source_lm(
            source, tokenizer, max_length=max_length, generator=engine, progress=functools.partial(meter, chat)
        )
        samples = _evaluated(model, tasks, chat=chat) if tasks else {}
        outcomes |= {task.name: _of_task(task, samples) for task in tasks}
    if empty := [name for name, found in outcomes.items() if not found]:
        lines.append(not_scored(empty, "none of its metrics is a mean over documents"))
    return {name: found for task in able for name, found in outcomes[task.name].items()}, lines


def _has_template(tokenizer: Any) -> bool:
    files = getattr(tokenizer, "files", None)
    return files is not None and bool(files.chat_templates.get("default"))


def _ungenerated(source: LogitSource, asked: Sequence[AskedTask], able: Sequence[AskedTask]) -> list[Fallback]:
    left = [task.name for task in asked if task not in able]
    return [not_scored(left, f"answers are generated, which needs an engine; {source.name} has none")] if left else []


def _plain(tasks: Sequence[AskedTask]) -> list[Fallback]:
    asked = ", ".join(task.name for task in tasks if task.choice.chat)
    reason = "the model has no chat template"
    return [Fallback(subject="tasks", wanted=f"{asked} as chat", used="plain text", reason=reason)] if asked else []


class _Meter:
    """Progress over requests of several kinds, each of its own weight."""

    def __init__(self, progress: Callable[[float], None], work: Mapping[tuple[bool, str], float]):
        self.progress, self.work, self.done = progress, work, dict.fromkeys(work, 0.0)

    def __call__(self, chat: bool, kind: str, share: float) -> None:
        self.done[chat, kind] = share
        self.progress(sum(self.work[key] * done for key, done in self.done.items()) / sum(self.work.values()))


_GENERATED = 20.0  # a generated answer costs so many times a chosen one


def _work(tasks: Sequence[AskedTask]) -> dict[str, float]:
    """How much each kind of request weighs, by lm-eval's name of it."""
    work: dict[str, float] = {}
    for task in tasks:
        for label, part in task.parts.items():
            generated = part.OUTPUT_TYPE == "generate_until"
            kind = "generate_until" if generated else "loglikelihood"
            work[kind] = work.get(kind, 0.0) + task.size(label) * (_GENERATED if generated else 1.0)
    return work


def _evaluated(model: Any, tasks: Sequence[AskedTask], *, chat: bool) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every part, by "<task>/<part>"."""
    from lm_eval.evaluator import evaluate

    from compress.scoring.tasks.quiet import quiet

    parts = {f"{task.name}/{label}": part for task in tasks for label, part in task.parts.items()}
    documents = {f"{task.name}/{label}": places for task in tasks for label, places in task.documents.items()}
    for part in parts.values():
        part.set_fewshot_seed(FEWSHOT_SEED)  # anew, so that every model gets the same examples
    with quiet():
        results = evaluate(
            model, {"tasks": parts}, samples=documents, bootstrap_iters=0, log_samples=True, apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )  # fmt: skip
    return results["samples"]


def _of_task(task: AskedTask, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Outcomes]:
    """Outcomes of a task by its name, or of a group's tasks by theirs; {} where there is nothing to average."""
    found = {label: _of_part(part, samples[f"{task.name}/{label}"]) for label, part in task.parts.items()}
    able = {label: outcomes for label, outcomes in found.items() if outcomes is not None}
    if list(task.parts) == [task.name] or len(able) != len(found) or len({o.headline for o in able.values()}) > 1:
        return able
    pooled = list(able.values())
    starts = np.cumsum([0, *(len(part.eval_docs) for part in task.parts.values())])
    places = [outcomes.documents + start for outcomes, start in zip(pooled, starts, strict=False)]
    groups = tuple(label for label, outcomes in able.items() for _ in outcomes.documents)
    answers = None if any(o.answers is None for o in pooled) else tuple(a for o in pooled for a in o.answers or ())
    headline = pooled[0].headline
    values = {headline: np.concatenate([outcomes.values[headline] for outcomes in pooled])}
    return {task.name: Outcomes(np.concatenate(places), values, groups, answers, task.name)}


def _of_part(part: Any, samples: Sequence[Mapping[str, Any]]) -> Outcomes | None:
    """One of lm-eval's tasks; None where none of its metrics is a mean over documents."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    first = next(iter(by_filter.values()))
    values: dict[str, np.ndarray] = {}
    for number, (name, answered) in enumerate(by_filter.items()):
        for metric in first[0]["metrics"]:
            if _is_mean(part, metric, [sample[metric] for sample in answered]):
                label = f"{metric} ({name})" if number else metric
                values[label] = np.array([float(sample[metric]) for sample in answered])
    if not values:
        return None
    order = (declared(part, "headline"), *PREFERRED, next(iter(values)))
    headline = next(metric for metric in order if metric in values)
    group = declared(part, "group")
    return Outcomes(
        documents=np.array([sample["doc_id"] for sample in first], np.int64),
        values={headline: values.pop(headline), **values},
        groups=tuple(str(sample["doc"][group]) for sample in first) if group else None,
        answers=_answers(part, headline, first),
        title=str(declared(part, "title") or part.task_name),
    )


def _is_mean(part: Any, metric: str, values: Sequence[Any]) -> bool:
    """Whether what lm-eval reports is the mean of these numbers, or the perplexity of these log-likelihoods."""
    aggregated = getattr(part.aggregation().get(metric), "__name__", "")
    return aggregated in ("mean", PERPLEXITY) and all(isinstance(value, Real) for value in values)


def _answers(part: Any, headline: str, samples: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """What was answered: the text, or the number of the choice that the headline metric takes; None where that is neither."""
    if part.OUTPUT_TYPE == "generate_until":
        return tuple(str(sample["filtered_resps"][0]) for sample in samples)
    if part.OUTPUT_TYPE != "multiple_choice":
        return None
    chosen = []
    for sample in samples:
        choices = [str(choice) for choice in part.doc_to_choice(sample["doc"])]
        likelihoods = np.array([likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]])
        lengths = {"acc_norm": [len(c) for c in choices], "acc_bytes": [len(c.encode()) for c in choices]}
        chosen.append(str(int(np.argmax(likelihoods / np.array(lengths.get(headline, 1.0))))))
    return tuple(chosen)
