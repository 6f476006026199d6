"""What a model is compared with: its original's predictions and answers, computed or remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from compress.scoring.divergence import Computed, Reference
from compress.scoring.results import Fallback
from compress.scoring.tasks.outcomes import Outcomes

Answers = tuple[dict[str, Outcomes], list[Fallback]]
"""Outcomes of tasks by name, and what was left out or done otherwise."""


class Original(Reference, Protocol):
    """A Reference that also answers tasks."""

    def answers(self, question: str, compute: Callable[[], Answers]) -> Answers:
        """What it answers. question: sha256 (hex) of all that is asked; compute: asks its source."""
        ...


@dataclass(frozen=True)
class Fresh(Computed):
    """An Original that computes everything anew."""

    def answers(self, question: str, compute: Callable[[], Answers]) -> Answers:
        return compute()
