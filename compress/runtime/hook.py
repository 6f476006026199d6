"""Makes transformers load folders of the container `compress`, without importing transformers.

If transformers' quantizers are loaded already, ours is added at once; else an import hook adds it when they first are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _Hook:
    """A meta-path finder that knows one module: it lets the others find it and adds our quantizer once it has run.

    It stays where it is: whoever only looks for the module does not use it up.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TARGET:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now or as soon as transformers' quantizers are imported; calling it again changes nothing."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    import_module("compress.runtime.loader")  # registers itself; it may be what is importing transformers just now
