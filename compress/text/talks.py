"""Talks as text: in the model's own chat template, or joined plainly where there is none; what was done otherwise is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import CalibrationError
from compress.text.chat import rendered
from compress.text.shapes import Talk
from compress.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """A text. rendered: by a chat template, whose own special tokens it holds."""

    text: str
    rendered: bool = False


@dataclass
class Speaker:
    """What makes text of talks for one model. template: None joins them plainly."""

    template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False
    """Whether plain talks are what the user asked for, so that no line is due."""
    done: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, tokenizer: Tokenizer, wanted: bool | None) -> Speaker:
        """wanted: true demands the chat template, false does without. CalibrationError where it is demanded and there is none."""
        template = tokenizer.chat_template
        if wanted and template is None:
            raise CalibrationError(
                "calibration.template is true, but the tokenizer has no chat template; put chat_template.jinja beside it, "
                "or leave it out: talks are then joined as 'role: text'"
            )
        if wanted is False or template is None:
            return cls(asked=wanted is False)
        return cls(template, tokenizer.template_tokens)

    def text_of(self, talk: Talk) -> Document:
        """A talk as one document."""
        self.done["talks"] += 1
        if self.template is None:
            return Document(joined(talk.messages))
        for way, messages in (("", talk.messages), ("folded", folded(talk.messages))):
            if messages and (text := rendered(self.template, self.special, prompt=False, talk=messages)):
                self.done[way] += 1
                return Document(text, rendered=True)
        self.done["refused"] += 1
        return Document(joined(talk.messages))

    def lines(self) -> list[str]:
        """What deserves a line of the talks so far."""
        talks, found = self.done["talks"], []
        if talks and self.template is None and not self.asked:
            found.append(f"the tokenizer has no chat template: {talks:,} talks are joined as 'role: text'")
        if count := self.done["folded"]:
            told = f"the chat template takes no system's message: {count:,} of {talks:,} talks"
            found.append(f"{told} have it in the user's first one")
        if count := self.done["refused"]:
            found.append(f"the chat template refuses {count:,} of {talks:,} talks: they are joined as 'role: text'")
        return found


def joined(messages: Sequence[Mapping[str, Any]]) -> str:
    """A talk as plain text: role and content, one message a line and on."""
    return "\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return message["content"] or (json.dumps(calls, ensure_ascii=False, default=str) if calls else "")


def folded(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """A talk whose system's message stands at the head of the user's first one; empty where it has no such message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return ()
    system, first, *rest = messages
    return ({**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest)
