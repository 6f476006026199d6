"""What a model's chat template makes of a talk; a template is a program of others, so it runs in bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

TALK = (
    {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Thanks!"},
)  # fmt: skip
_LARGEST = 200_000  # characters of a template
_STEPS = 100_000  # numbers that all its ranges may count together


def rendered(
    template: str, special: Mapping[str, str], *, prompt: bool, talk: Sequence[Mapping[str, Any]] = TALK
) -> str | None:
    """A talk as text, or None where the template wants another one, or more than a talk takes.

    special: texts by their names in templates, e.g. bos_token; prompt: whether the model is to answer next; talk: messages
    with a role and a content. Given to the template as transformers' apply_chat_template does, tools and documents as none.
    """
    from jinja2 import TemplateError

    try:
        if len(template) <= _LARGEST:
            given = {**special, "tools": None, "documents": None, "range": _counted()}
            return str(_compiled(template).render(messages=talk, add_generation_prompt=prompt, **given))
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError):
        pass
    return None


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _environment() -> Any:
    """Jinja as transformers sets it up, in a sandbox in which nothing grows without bounds."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
                raise SecurityError(f"{operator} could make anything large")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """{% generation %} marks what the assistant says, and changes nothing of it."""

        tags = {"generation"}  # noqa: RUF012 - the parent's own type

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: "26 Jul 2024"
    return environment


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent or 0, 8) or None, **options)


def _counted() -> Callable[..., range]:
    left = _STEPS

    def bounded(*arguments: int) -> range:
        nonlocal left
        numbers = range(*arguments)
        left -= len(numbers)
        if left < 0:
            raise OverflowError("a template that counts so far")
        return numbers

    return bounded


def _refuse(message: str) -> None:
    raise ValueError(message)
