"""Codecs from outside the package: a Python file that the user names, on the command line or here."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from compress.errors import RecipeError

_loaded: dict[str, str] = {}


def load(path: str | Path) -> None:
    """Run a Python file that calls `compress.codecs.register`; a second time for the same file does nothing.

    Only ever called with what the user names: no recipe or checkpoint can make it run. Raises RecipeError.
    """
    file = Path(path)
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"--plugin {file}: cannot be read: {error.strerror or error}") from None
    if _loaded.get(file.stem) == digest:
        return
    module = importlib.util.spec_from_file_location(f"compress_plugin_{file.stem}", file)
    if module is None or module.loader is None:
        raise RecipeError(f"--plugin {file}: not a Python file")
    try:
        module.loader.exec_module(importlib.util.module_from_spec(module))
    except Exception as error:
        raise RecipeError(f"--plugin {file}: {type(error).__name__}: {error}") from error
    _loaded[file.stem] = digest


def digests() -> dict[str, str]:
    """sha256 of every file loaded, by name: their code decides the bytes of the output, too."""
    return dict(_loaded)
