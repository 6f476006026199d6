"""Rows of data in the spellings that people have: each is the talk or text that its format's own documentation says."""

from __future__ import annotations

import pytest

from compress.text.shapes import Misread, Talk, understood

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
TALKS = {
    "openai": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "sharegpt": (
        {"id": "a1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [USER, ANSWER],
    ),
    "sharegpt with a system beside": (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [SYSTEM, USER, ANSWER],
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, [USER, ANSWER]),
    "prompt and completion as messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "question and answer": ({"id": 7, "question": "Hi", "answer": "Hello"}, [USER, ANSWER]),
    "alpaca": (
        {"instruction": "Greet.", "input": "", "output": "Hello", "text": "Below is an instruction ..."},
        [{"role": "user", "content": "Greet."}, ANSWER],
    ),
    "alpaca with input": (
        {"instruction": "Greet.", "input": "Hi", "output": "Hello"},
        [{"role": "user", "content": "Greet.\n\nHi"}, ANSWER],
    ),
    "rounds before": (
        {"instruction": "Bye", "output": "See you", "history": [["Hi", "Hello"]]},
        [USER, ANSWER, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}],
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
        [USER, ANSWER],
    ),
    "a call of a tool": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "weight": 0}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
    ),
    "a cell of a table": ({"messages": '[{"role": "user", "content": "Hi"}]', "text": None}, [USER]),
}


@pytest.mark.parametrize("name", TALKS)
def test_talks(name: str) -> None:
    row, messages = TALKS[name]
    found = understood(row)
    assert isinstance(found, Talk) and [dict(message) for message in found.messages] == messages


def test_texts() -> None:
    assert understood({"text": "plain", "title": "t"}) == "plain"
    assert understood("an item of a list") == "an item of a list"
    assert understood({"text": None, "meta": 1}) == ""
    assert understood({"messages": [USER], "body": "this"}, "body") == "this"
    assert understood({"talk": [USER]}, "talk") == Talk((USER,))


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        ({"title": "a", "body": "b"}, "", r"no text among its keys \(title, body\).*set 'column'"),
        ({}, "", r"among its keys \(none\)"),
        ({str(n): n for n in range(40)}, "", "and 28 more"),
        ({"text": 5}, "", "'text' is 5, not text"),
        ({"a": "b"}, "body", "no column 'body'; it has: a"),
        ({"a": 4}, "a", "'a' is 4; set 'column' to a text or a list of messages"),
        ({"messages": ["hi"]}, "", r"messages\[0\] has no 'role' and 'content'"),
        ({"messages": [USER, {"role": "assistant"}]}, "", r"messages\[1\] has no 'content'"),
        ({"messages": "hello"}, "", "'messages' is text, not a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "", r"no text \(image_url\)"),
    ],
)
def test_rows_that_say_nothing(row: dict, column: str, why: str) -> None:
    with pytest.raises(Misread, match=why):
        understood(row, column)
