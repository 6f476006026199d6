"""compress: recipes in, smaller language models out.

`run`, `plan`, `score` and `load_recipe` are the library's front door; what they take and return is beside them. Everything
is imported when it is first used: neither torch nor transformers comes with `import compress`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.runtime.hook import install as _install

if TYPE_CHECKING:
    from compress.codecs import register as register_codec
    from compress.plan.make import make_plan as plan
    from compress.plan.plan import Plan
    from compress.recipe.load import load_recipe
    from compress.recipe.schema import Recipe
    from compress.report.scorecard import Scorecard
    from compress.run.loop import run
    from compress.run.score import score

__version__ = "0.1.0"

_PUBLIC = {
    "Plan": ("compress.plan.plan", "Plan"),
    "Recipe": ("compress.recipe.schema", "Recipe"),
    "Scorecard": ("compress.report.scorecard", "Scorecard"),
    "load_recipe": ("compress.recipe.load", "load_recipe"),
    "plan": ("compress.plan.make", "make_plan"),
    "register_codec": ("compress.codecs", "register"),
    "run": ("compress.run.loop", "run"),
    "score": ("compress.run.score", "score"),
}
"""Public name -> where it is."""

__all__ = ["Plan", "Recipe", "Scorecard", "load_recipe", "plan", "register_codec", "run", "score"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`compress.run` is the function, `compress.plan` too, whatever was imported before: the import system would put the
    sub-packages of these names there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _PUBLIC):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_install()
