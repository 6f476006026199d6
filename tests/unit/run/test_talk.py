"""A talk: what the model is asked each time, and what goes when the context is full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from compress.engines.sampling import Choose, Sampling, chooser
from compress.engines.speech import Speaker
from compress.errors import CheckpointError
from compress.run.talk import Conversation

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


class Echo:
    """Answers with bytes it was made for, and remembers what it was asked."""

    name = "echo"

    def __init__(self, answer: bytes):
        self.answer, self.asked = answer, list[str]()

    def stream(self, prompt: np.ndarray, most: int, choose: Choose, *, reuse: bool = False) -> Iterator[int]:
        self.asked.append(bytes(prompt.tolist()).decode())
        yield from self.answer[:most]


def speaker(engine: Echo, template: str | None = TEMPLATE) -> Speaker:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    return Speaker(engine, lambda text: list(text.encode()), (), decode, None, template, {"bos_token": "<s>"})


def conversation(engine: Echo, context: int = 1000, most: int = 20, system: str = "") -> Conversation:
    return Conversation(speaker(engine), chooser(Sampling()), context, most, system)


def test_history_and_system_are_told_again() -> None:
    engine = Echo(b"yes")
    talk = conversation(engine, system="be brief")
    assert ["".join(talk.ask(text)) for text in ("one?", "two?")] == ["yes", "yes"]
    assert engine.asked == ["<s>[system]be brief[user]one?[a]",
                            "<s>[system]be brief[user]one?[assistant]yes[user]two?[a]"]  # fmt: skip
    talk.clear()
    list(talk.ask("three?"))
    assert engine.asked[-1] == "<s>[system]be brief[user]three?[a]"


def test_pieces_are_whole_characters() -> None:
    text = "é漢🙂."
    talk = conversation(Echo(text.encode()))
    assert list(talk.ask("x")) == list(text)
    cut = conversation(Echo(text.encode()), most=4)
    assert list(cut.ask("x")) == ["é", "�"]  # what was cut off in the middle is told, not lost


def test_an_answer_that_is_stopped_stays_in_the_history() -> None:
    engine = Echo(b"abcdef")
    talk = conversation(engine)
    pieces = talk.ask("x")
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()
    list(talk.ask("y"))
    assert engine.asked[-1] == "<s>[user]x[assistant]ab[user]y[a]"


def test_the_oldest_exchanges_make_room() -> None:
    engine = Echo(b"12345")
    talk = conversation(engine, context=60, most=10)
    for number in range(4):
        list(talk.ask(f"question {number}"))
    assert talk.forgotten > 0
    assert all(len(asked) + 10 <= 60 for asked in engine.asked)
    assert engine.asked[-1].endswith("[user]question 3[a]") and "question 0" not in engine.asked[-1]
    with pytest.raises(CheckpointError, match="--context"):
        list(talk.ask("q" * 100))
    list(talk.ask("short"))  # what did not fit was not kept
    assert "qqq" not in engine.asked[-1]


def test_a_model_without_a_template_says_so() -> None:
    talk = Conversation(speaker(Echo(b""), None), chooser(Sampling()), 100, 10)
    with pytest.raises(CheckpointError, match="no chat template"):
        list(talk.ask("x"))
