"""Codecs, methods, scalings, containers and families from outside the package: a Python file that the user names, on the command line or here."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from compress.errors import RecipeError

_loaded: dict[str, str] = {}
"""sha256 of each file -> its name."""


def load(path: str | Path) -> None:
    """Run a Python file that calls `register` of `compress.codecs`, `compress.containers`, `compress.models`,
    `compress.solvers.options` or `compress.transforms.options`; a second time for the same bytes does nothing.

    Only ever called with what the user names: no recipe or checkpoint can make it run. Raises RecipeError.
    """
    file = Path(path)
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"--plugin {file}: cannot be read: {error.strerror or error}") from None
    if digest in _loaded:
        return
    spec = importlib.util.spec_from_file_location(f"compress_plugin_{digest}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"--plugin {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise RecipeError(f"--plugin {file}: {type(error).__name__}: {error}") from error
    _loaded[digest] = file.name


def digests() -> tuple[str, ...]:
    """sha256 of every file loaded: their code decides the bytes of the output, too."""
    return tuple(sorted(_loaded))
