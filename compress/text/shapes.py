"""What a row of data means, by the keys that it has: a talk in one of the usual spellings, or plain text.

A spelling is one function and the keys that it needs; the first one whose keys a row has reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.reading import in_words, shown

Values = Mapping[str, Any]
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "bard": "assistant",
    "bing": "assistant", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of speakers, as templates know them."""
MOST_KEYS = 12  # that an error names


class Misread(Exception):
    """Why a row is no talk and no text."""


@dataclass(frozen=True)
class Talk:
    """Messages, each with a role, a content and whatever else a template may ask of it."""

    messages: tuple[Values, ...]


@dataclass(frozen=True)
class Shape:
    """A spelling. needs: groups of keys; a row has one of each group. read: what it says; Misread where it says nothing."""

    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Values], Talk | str]

    def fits(self, row: Values) -> bool:
        """Whether a row has what this spelling needs, and it is no null."""
        return all(_first(row, keys) is not None for keys in self.needs)

    def __str__(self) -> str:
        return " + ".join("/".join(keys) for keys in self.needs)


def understood(row: Values | str, column: str = "") -> Talk | str:
    """The talk or text of a row; empty where it has the keys, but nothing in them. column: where it is, if that is known.

    Raises Misread with the keys that there are and what would do.
    """
    if isinstance(row, str):
        return row
    if column:
        return _of_column(row, column)
    for shape in SHAPES:
        if shape.fits(row):
            return shape.read(row)
    if any(all(any(key in row for key in keys) for keys in shape.needs) for shape in SHAPES):
        return ""
    known = ", ".join(map(str, SHAPES))
    raise Misread(f"no text among its keys ({keys_of(row)}); known are {known}; set 'column' to the one that holds it")


def keys_of(row: Values) -> str:
    """The keys of a row, for people."""
    named = [shown(str(key)) for key in list(row)[:MOST_KEYS]]
    return ", ".join(named + ([f"and {len(row) - MOST_KEYS} more"] if len(row) > MOST_KEYS else [])) or "none"


def _of_column(row: Values, column: str) -> Talk | str:
    if column not in row:
        raise Misread(f"no column '{shown(column)}'; it has: {keys_of(row)}")
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return Talk(_messages(value, column))
    raise Misread(f"'{shown(column)}' is {in_words(value)}; set 'column' to a text or a list of messages")


# ------------------------------------------------------------------------------------- the spellings


def _of_messages(row: Values) -> Talk:
    """OpenAI's role and content, or ShareGPT's from and value; ShareGPT may have the system's message beside them."""
    key = next(key for key in _TALKS if row.get(key) is not None)
    given = row[key]
    if isinstance(given, str):  # a cell of a table
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise Misread(f"'{key}' is text, not a list of messages") from None
    found = _messages(given, key)
    if found and found[0]["role"] != "system":
        found = (*_system(row), *found)
    return Talk(found)


def _of_pairs(row: Values) -> Talk:
    """One question and its answer; either may be a list of messages."""
    parts: list[Values] = [*_system(row)]
    for keys, role in ((_ASKED, "user"), (_ANSWERED, "assistant")):
        value = _first(row, keys)
        if isinstance(value, list):
            parts += _messages(value, next(key for key in keys if row.get(key) is not None))
        else:
            parts.append({"role": role, "content": _text(value, "/".join(keys))})
    return Talk(tuple(parts))


def _of_instruction(row: Values) -> Talk:
    """Alpaca's instruction, with input, earlier rounds and a system's message where there are some."""
    asked = _text(row["instruction"], "instruction")
    more = _first(row, ("input", "context"))
    if more is not None and _text(more, "input").strip():
        asked = f"{asked}\n\n{more}"
    parts: list[Values] = [*_system(row)]
    history = row.get("history")
    for round in history if isinstance(history, list) else []:
        if isinstance(round, list) and len(round) == 2:
            parts += _round(_text(round[0], "history"), _text(round[1], "history"))
    answer = _first(row, ("output", "response"))
    return Talk((*parts, *_round(asked, _text(answer, "output"))))


def _of_text(row: Values) -> str:
    return _text(row["text"], "text")


_TALKS = ("messages", "conversations", "conversation")
_ASKED, _ANSWERED = ("prompt", "question", "query"), ("response", "completion", "answer")
SHAPES = (
    Shape((_TALKS,), _of_messages),
    Shape((_ASKED, _ANSWERED), _of_pairs),
    Shape((("instruction",), ("output", "response")), _of_instruction),
    Shape((("text",),), _of_text),
)


def _first(row: Values, keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise Misread(f"'{key}' is {in_words(value)}, not text; set 'column' to what holds the text")
    return value


def _round(asked: str, answered: str) -> tuple[Values, Values]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def _system(row: Values) -> tuple[Values, ...]:
    text = _first(row, ("system", "system_prompt"))
    return ({"role": "system", "content": text},) if isinstance(text, str) and text.strip() else ()


def _messages(given: Any, key: str) -> tuple[Values, ...]:
    if not isinstance(given, list):
        raise Misread(f"'{key}' is {in_words(given)}, not a list of messages")
    return tuple(_message(message, f"{key}[{number}]") for number, message in enumerate(given))


def _message(given: Any, place: str) -> Values:
    role = given.get("role") or given.get("from") if isinstance(given, Mapping) else None
    if not isinstance(role, str):
        raise Misread(f"{place} has no 'role' and 'content' (or 'from' and 'value')")
    content = given["content"] if given.get("content") is not None else given.get("value")
    if isinstance(content, list):
        content = _parts(content, place)
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise Misread(f"{place} has no 'content' (or 'value') that is text")
    more = {name: v for name, v in given.items() if name not in ("from", "value", "weight") and v is not None}
    return {**more, "role": ROLES.get(role.lower(), role), "content": content}


def _parts(parts: list[Any], place: str) -> str:
    """The content of a message that is written in parts."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            what = part.get("type", "no type") if isinstance(part, Mapping) else in_words(part)
            raise Misread(f"{place} holds a part that is no text ({shown(str(what))}); only text is read")
    return "\n".join(part["text"] for part in parts)
