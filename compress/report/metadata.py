"""The front matter of a model card: what the hub reads of a repository."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from compress.containers import CONTAINERS
from compress.report.reproduction import Reproduction
from compress.report.scorecard import Artifact, Scorecard
from compress.scoring.divergence import Scores
from compress.scoring.results import TaskScore, headline, task_title

TASK = {"type": "text-generation", "name": "Text generation"}
_SOLVED = ("quantize", "prune", "factorize")  # steps that are called by their method
_ACCURACY = re.compile(r"acc(uracy)?(_norm)?")


def front_matter(card: Scorecard, made: Reproduction, title: str, names: Sequence[str]) -> str:
    """YAML between its two lines. names: of the artifacts, for people, in their order."""
    of = made.original
    hub = of.identity.id if of.commit else None  # what has a commit came from the hub
    said = {
        "base_model": hub,
        "base_model_relation": hub and "quantized",
        "library_name": next((library for a in card.artifacts if (library := _library(a))), None),
        "license": of.license,
        "license_name": of.license_name,
        "license_link": of.license_link,
        "language": list(of.languages),
        "pipeline_tag": TASK["type"],
        "tags": _tags(card, made),
        "datasets": list(made.datasets),
        "model-index": _model_index(card, title, names),
    }
    told = {key: value for key, value in said.items() if value}
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)}---\n"


def _library(artifact: Artifact) -> str:
    container = CONTAINERS.get(artifact.container)
    return "" if container is None else container.library


def scheme_of(recipe: Mapping[str, Any]) -> str:
    """The type that says which codec every tensor has; "" where rules or other steps have a say."""
    kinds = {kind: options for step in recipe.get("steps") or () for kind, options in step.items()}
    quantize = kinds.get("quantize") or {}
    return "" if quantize.get("rules") else quantize.get("scheme") or ""


def _tags(card: Scorecard, made: Reproduction) -> list[str]:
    """Formats, types, methods, experts. The name of a format that was not written means its files to those who search, also where
    a method of that name was used."""
    formats = [artifact.container for artifact in card.artifacts]
    types = [artifact.variant or scheme_of(made.recipe) for artifact in card.artifacts]
    methods = [_method(kind, options) for step in made.recipe.get("steps") or () for kind, options in step.items()]
    moe = bool(card.experts) or any(error.role.startswith("routed_experts") for error in card.errors)
    found = [*formats, *types, *methods, *(["moe"] if moe else []), "compress-llm"]
    return [tag for tag in dict.fromkeys(found) if tag and (tag in formats or tag not in CONTAINERS)]


def _method(kind: str, options: Any) -> str:
    named = options.get("solver") if kind in _SOLVED and isinstance(options, Mapping) else options
    name = named.get("name") if isinstance(named, Mapping) else None
    return str(name or kind).replace("_", "-")


def _model_index(card: Scorecard, title: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry: what was measured, by text and task; of several artifacts each metric says whose it is."""
    datasets: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for artifact, name in zip(card.artifacts, names, strict=True):
        of = f", {name}" if len(card.artifacts) > 1 else ""
        for dataset, metric, label, value in _measured(artifact):
            if value is not None and math.isfinite(value):
                entry = {"type": metric, "name": label + of, "value": float(f"{value:.6g}")}
                datasets.setdefault(dataset, []).append(entry)
    results = [
        {"task": dict(TASK), "dataset": {"type": kind, "name": name}, "metrics": metrics}
        for (kind, name), metrics in datasets.items()
    ]
    return [{"name": title, "results": results}] if results else []


Measured = tuple[tuple[str, str], str, str, float | None]
"""Type and name of a dataset, type and name of a metric, its value."""


def _measured(artifact: Artifact) -> Iterator[Measured]:
    first = {} if artifact.scores is None else {artifact.scores.text or "text": artifact.scores}
    for name, scores in (artifact.texts or first).items():
        yield from _of_text(name, scores)
    for name, score in artifact.tasks.items():
        if headline(name):
            yield _of_task(name, score)


def _of_text(name: str, scores: Scores) -> Iterator[Measured]:
    dataset = _slug(name), name
    yield dataset, "perplexity", "Token perplexity", scores.perplexity.value
    if scores.kld is not None:
        yield dataset, "kl_divergence", "Mean KL divergence from the original, nats per token", scores.kld.mean
    if scores.top1_agreement is not None:
        yield dataset, "top1_agreement", "Share of tokens with the original's likeliest", scores.top1_agreement.value


def _of_task(name: str, score: TaskScore) -> Measured:
    title, metric = task_title(name, score.title)
    kind = "accuracy" if _ACCURACY.fullmatch(score.metric) else _slug(metric or score.metric)
    return (_slug(title), title), kind, kind.replace("_", " ").capitalize(), score.value


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text.strip().lower()).strip("_") or "text"
