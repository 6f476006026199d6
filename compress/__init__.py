"""compress: recipes in, smaller language models out.

`run`, `plan`, `score`, `compare` and `load_recipe` are the library's front door (docs/python.md); what they take and return is
beside them. Everything is imported when it is first used: neither torch nor transformers comes with `import compress`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.runtime.hook import install as _install

if TYPE_CHECKING:
    from compress.api import compare, ladder, plan, run, score
    from compress.codecs import register as register_codec
    from compress.plan.plan import Plan
    from compress.recipe.load import load_recipe
    from compress.recipe.schema import Recipe
    from compress.report.result import Compared, Result
    from compress.report.scorecard import Scorecard

__version__ = "0.1.0"

_PUBLIC = {
    "Compared": ("compress.report.result", "Compared"),
    "Plan": ("compress.plan.plan", "Plan"),
    "Recipe": ("compress.recipe.schema", "Recipe"),
    "Result": ("compress.report.result", "Result"),
    "Scorecard": ("compress.report.scorecard", "Scorecard"),
    "compare": ("compress.api", "compare"),
    "ladder": ("compress.api", "ladder"),
    "load_recipe": ("compress.recipe.load", "load_recipe"),
    "plan": ("compress.api", "plan"),
    "register_codec": ("compress.codecs", "register"),
    "run": ("compress.api", "run"),
    "score": ("compress.api", "score"),
}
"""Public name -> where it is."""

__all__ = [
    "Compared", "Plan", "Recipe", "Result", "Scorecard", "compare", "ladder", "load_recipe", "plan", "register_codec", "run",
    "score",
]  # fmt: skip


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
