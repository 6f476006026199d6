"""A talk with a model: history, answers that appear as they are made, and what goes when the context is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from compress.engines.sampling import Choose
from compress.engines.speech import Speaker
from compress.errors import CheckpointError


@dataclass
class Conversation:
    """Messages so far, with a model that answers. context: tokens that question and answer may take together; most: tokens of
    an answer."""

    speaker: Speaker
    choose: Choose
    context: int
    most: int
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0
    """Exchanges that had to go to make room, so far."""

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces; it joins the history, also where the caller stops early. Where the context is too small for
        all, the oldest exchanges go. Raises CheckpointError where it is too small for the question alone."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            ids = self._fitting()
            for piece in self.speaker.stream(ids, min(self.most, self.context - len(ids)), self.choose):
                said.append(piece)
                yield piece
        except CheckpointError:
            self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user" and said:
                self.messages.append({"role": "assistant", "content": "".join(said)})

    def clear(self) -> None:
        """Forget all but the system's message."""
        self.messages, self.forgotten = [], 0

    def _fitting(self) -> list[int]:
        """Ids of the talk, without the oldest exchanges that leave no room for an answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        for gone in range(0, len(self.messages), 2):
            ids = self.speaker.question([*system, *self.messages[gone:]])
            if len(ids) < self.context - min(self.most, self.context // 4):
                del self.messages[:gone]
                self.forgotten += gone // 2
                return ids
        raise CheckpointError(
            f"the question takes {len(ids):,} of {self.context:,} tokens; raise --context, or ask shorter"
        )
