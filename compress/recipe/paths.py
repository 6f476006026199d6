"""Where a recipe has places for values: what `--set` may name in full, in part, or wrongly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from compress.reading import Place, dotted
from compress.recipe.rules import closest
from compress.recipe.schema import STEP_KINDS, Recipe, Step
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS
from compress.transforms.options import SCALINGS

_PATH = re.compile(r"[^\W\d]\w*(\[\d{1,9}\]|\.\d{1,9}(?!\w)|\.[^\W\d]\w*)*", re.ASCII)
_METHODS = {**SOLVERS, **PRUNERS, **FACTORIZERS}
_OPTIONS = {(key,) for method in _METHODS.values() for key in method.model_fields}


def find_place(text: str, data: Any) -> Place | str:
    """The place in a recipe's plain values that `text` names, in full (`steps[0].quantize.scheme`, `steps.0.quantize.scheme`)
    or by its last parts where these name no other (`scheme`); or what is wrong with it, in words."""
    if not _PATH.fullmatch(text):
        return "expected key=value, e.g. calibration.samples=64"
    path: Place = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", text))
    places = set(_places(Recipe, data, ()))
    if path[0] in Recipe.model_fields and _is_there(path, places):
        return path
    known = sorted(places, key=lambda place: (len(place), dotted(place)))
    ends = [place for place in known if path in (place[-len(path) :], _keys(place)[-len(path) :])]
    if len(ends) == 1:
        return ends[0]
    if ends:
        return f"{dotted(path)} may be {' or '.join(map(dotted, ends[:4]))}; write one of these"
    tails = {str(place[-1]): dotted(place) for place in reversed(known)}
    near = closest(dotted(path), map(dotted, known)) or [tails[tail] for tail in closest(str(path[-1]), tails, 1)]
    told = f"; nearest: {', '.join(near)}" if near else ""
    return f"{dotted(path)}: there is no such place in this recipe{told}"


def _keys(place: Place) -> Place:
    return tuple(part for part in place if isinstance(part, str))


def _is_there(path: Place, places: set[Place]) -> bool:
    """Whether a recipe has a place for `path`: one that is known, an item of a list, a kind of step, or whatever is inside of a
    value that is no section."""
    head = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in places), ())
    rest = path[len(head) :]
    if not head or not rest or isinstance(rest[0], int):
        return bool(head)
    of_another_method = head[-1] == "solver" and rest in _OPTIONS  # which a later value may name
    return of_another_method or not _is_section(head, places)


def _is_section(place: Place, places: set[Place]) -> bool:
    """Whether all keys inside of a place are known."""
    within = len(place)
    return any(len(p) > within and p[:within] == place and isinstance(p[within], str) for p in places)


def _places(model: type[BaseModel], data: Any, at: Place) -> Iterator[Place]:
    """Every place below `at`, where `data` is written down and a `model` expected."""
    for name, field in model.model_fields.items():
        place, value = (*at, name), data.get(name) if isinstance(data, dict) else None
        yield place
        if name == "solver":
            yield from _solver(value, field.default, place)
            continue
        inside = next(_models_in(field.annotation), None)
        if inside is None:
            continue
        if isinstance(value, list):
            for number, item in enumerate(value):
                yield (*place, number)
                yield from _step(item, (*place, number)) if inside is Step else _places(inside, item, (*place, number))
        elif "tuple" not in str(field.annotation):
            yield from _places(inside, value, place)


def _step(item: Any, at: Place) -> Iterator[Place]:
    """Of one step: the kinds it may be, and what is inside of the one it is."""
    written = {item: None} if isinstance(item, str) else item if isinstance(item, dict) else {}
    for kind in (*STEP_KINDS, *SCALINGS):
        yield (*at, kind)
        if kind in written:
            inside = SCALINGS.get(kind) or next(_models_in(Step.model_fields[kind].annotation))
            yield from _places(inside, written[kind], (*at, kind))


def _solver(value: Any, default: Any, at: Place) -> Iterator[Place]:
    """Of a method's options; of all solvers' where a rule does not say which."""
    name = value.get("name") if isinstance(value, dict) else value
    named = _METHODS.get(str(name).lower()) if name is not None else type(default) if default is not None else None
    options = list(SOLVERS.values()) if name is None and default is None else [named] if named is not None else []
    yield (*at, "name")
    yield from ((*at, key) for method in options for key in method.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
