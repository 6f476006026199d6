"""What is wrong with a recipe, in words: pydantic's errors, and combinations that no model could make possible."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from compress.codecs.names import KIND_NAMES, codec_info
from compress.containers import CONTAINERS, Container, activation_problem, incoherence_problem
from compress.limits import MOST_RULES, MOST_STEPS
from compress.reading import Place, dotted, in_words, wrong
from compress.recipe.document import Document
from compress.recipe.rules import FLOAT_ROLES, covers, nearest
from compress.recipe.schema import Recipe
from compress.recipe.schemes import scheme_kind, scheme_name
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS

# --- problems in words ------------------------------------------------------------------------


def explain(document: Document, error: Any) -> str:
    """One of pydantic's errors in the words of a recipe."""
    path = _written(document.data, error["loc"])
    if error["type"] == "extra_forbidden":
        return document.at(
            path, f"unknown key {in_words(path[-1])}{nearest(str(path[-1]), _keys_at(document.data, path[:-1]))}"
        )
    if error["type"] == "missing":
        return document.at(path, _MISSING_KEYS.get(dotted(path), "missing"))
    return document.at(path, error["msg"] if error["type"] == "recipe" else wrong(error))


_MISSING_KEYS = {
    "model": "missing; name a folder, a hub id or a bundled model here, or pass --model",
    "export": "missing; say which container to write, e.g. export: [{container: gguf}]",
}


def _written(data: Any, loc: Place) -> Place:
    """`loc` without what pydantic adds: the index into a list written as one word, tags of unions."""
    path: list[str | int] = []
    here = data
    for position, part in enumerate(loc):
        if isinstance(here, dict) and isinstance(part, str) and (part in here or position == len(loc) - 1):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _keys_at(data: Any, path: Place) -> tuple[str, ...]:
    """The keys a mapping at `path` may have."""
    model: type[BaseModel] = Recipe
    for part in path:
        data = data[part]
        if part == "solver":
            model = {**SOLVERS, **PRUNERS, **FACTORIZERS}[data["name"].lower()]
        elif isinstance(part, str):
            model = next(_models_in(model.model_fields[part].annotation), model)
    return tuple(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def impossible(data: Any) -> Iterator[tuple[Place, str]]:
    """Combinations no model could make possible, from raw values, so that they join all other problems."""
    exports = _get(data, "export") if isinstance(_get(data, "export"), list) else []
    containers = [
        (i, CONTAINERS[name])
        for i, item in enumerate(exports)
        if (name := (_text(item, "container") or "").lower()) in CONTAINERS
    ]
    seen: dict[tuple[str, str | None], int] = {}
    for i, container in containers:
        first = seen.setdefault((container.name, _text(exports[i], "name") or _text(data, "name")), i)
        if first != i:
            yield ("export", i), f"the same file as export[{first}]; give one of them another name"
    steps = _get(data, "steps") if isinstance(_get(data, "steps"), list) else []
    for s, step in enumerate(steps[:MOST_STEPS]):
        at: Place = ("steps", s, "quantize")
        quantize = _get(step, "quantize")
        if (scheme := _text(quantize, "scheme")) is not None:
            try:
                kind = scheme_kind(scheme)
            except ValueError:
                kind = None
            for i, container in containers:
                if kind is not None and kind not in container.kinds:
                    yield (*at, "scheme"), _refusal(scheme, container, i)
                elif kind is not None and scheme_name(scheme) == "W8A8" and (why := activation_problem(container)):
                    yield (*at, "scheme"), why
        rules = _get(quantize, "rules")
        for r, rule in enumerate(rules[:MOST_RULES] if isinstance(rules, list) else []):
            yield from _impossible_rule(rule, (*at, "rules", r), containers)


def _impossible_rule(rule: Any, at: Place, containers: list[tuple[int, Container]]) -> Iterator[tuple[Place, str]]:
    codec, targets = _text(rule, "codec"), _get(rule, "targets")
    targets = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    try:
        info = codec_info(codec) if codec is not None else None
    except KeyError:
        info = None
    if info is None or info.fallback_only or info.kind == "float":  # unknown ones are reported by the schema
        return
    for target in targets:
        if any(covers(str(target), role) for role in FLOAT_ROLES):
            yield (
                (*at, "codec"),
                f"{target} is never quantized; use f32, f16 or bf16, or list it under ignore",
            )
    for i, container in containers:
        if info.kind not in container.kinds:
            yield (*at, "codec"), _refusal(info.name, container, i)
        elif any(covers(str(target), role) for target in targets for role in container.float_roles):
            roles = ", ".join(container.float_roles)
            yield (
                (*at, "codec"),
                f"container {container.name} (export[{i}]) holds {roles} only as f32, f16 or bf16",
            )
        if _get(rule, "activations") and (why := activation_problem(container)):
            yield (*at, "activations"), why
        if _get(rule, "incoherence") is True and (why := incoherence_problem(container)):
            yield (*at, "incoherence"), why


def _refusal(what: str, container: Container, index: int) -> str:
    holds = " and ".join(KIND_NAMES[kind] for kind in KIND_NAMES if kind in container.kinds)
    others = [other.name for other in CONTAINERS.values() if _kind(what) in other.kinds]
    refused = f"container {container.name} (export[{index}]) cannot hold {what}"
    return f"{refused}; it holds {holds}; use {' or '.join(others)}"


@cache
def _kind(what: str) -> str:
    try:
        return codec_info(what).kind
    except KeyError:
        return scheme_kind(what)


def _text(value: Any, key: str) -> str | None:
    found = _get(value, key)
    return found if isinstance(found, str) else None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
