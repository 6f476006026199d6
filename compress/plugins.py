"""Codecs, methods, scalings, containers and families from outside the package: a Python file that the user names, on the
command line or here (docs/extending.md)."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from compress import codecs
from compress.codecs import names
from compress.containers import CONTAINERS
from compress.errors import RecipeError
from compress.models import spec as families
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS
from compress.transforms.options import SCALINGS

_loaded: dict[str, str] = {}
"""sha256 of each file -> its name."""
_REGISTRIES: tuple[dict[str, Any], ...] = (
    _loaded, names._REGISTERED, codecs._REGISTERED, families._REGISTERED, CONTAINERS, SOLVERS, PRUNERS, FACTORIZERS, SCALINGS,
)  # fmt: skip
"""All that a file may add to."""
_FUNCTIONS = ((SOLVERS, "solve"), (PRUNERS, "prune"), (FACTORIZERS, "factorize"), (SCALINGS, "search"))
"""What the `module` of options has."""

Registered = tuple[dict[str, Any], ...]


def load(path: str | Path) -> None:
    """Run a Python file that calls `register` of `compress.codecs`, `compress.containers`, `compress.models`,
    `compress.solvers.options` or `compress.transforms.options`; a second time for the same bytes does nothing.

    Only ever called with what the user names: no recipe or checkpoint can make it run. Raises RecipeError for a file that
    cannot be read, raises or exits; nothing of it stays registered then.
    """
    file = Path(path)
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"--plugin {file}: cannot be read: {error.strerror or error}") from None
    if digest in _loaded:
        return
    found = importlib.util.spec_from_file_location(f"compress_plugin_{digest}", file)
    if found is None or found.loader is None or found.origin is None:
        raise RecipeError(f"--plugin {file}: not a Python file")
    module, before = importlib.util.module_from_spec(found), registered()
    sys.modules[found.name] = module  # dataclasses look their module up there
    try:
        found.loader.exec_module(module)
        _prove(before)
    except BaseException as error:
        restore(before)
        del sys.modules[found.name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RecipeError(f"--plugin {file}{_complaint(found.origin, error)}") from error
    _loaded[digest] = found.origin


def digests() -> tuple[str, ...]:
    """sha256 of every file loaded: their code decides the bytes of the output, too."""
    return tuple(sorted(_loaded))


def registered() -> Registered:
    """What files have added so far, and what was there before, for `restore`."""
    return tuple(dict(registry) for registry in _REGISTRIES)


def restore(before: Registered) -> None:
    """Forget what was registered since `registered` gave `before`."""
    for registry, entries in zip(_REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    codecs.get_codec.cache_clear()
    names.codec_info.cache_clear()


def blamed(error: BaseException) -> str | None:
    """A line about an error or an exit that a loaded file is part of, None for any other."""
    places = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    file = next((file for file in _loaded.values() if file in places), None)
    return f"plugin {file}{_complaint(file, error)}" if file else None


def _prove(before: Registered) -> None:
    """Raise ValueError for options, registered since, that a run could not use."""
    for registry, entries in zip(_REGISTRIES, before, strict=True):
        function = next((function for known, function in _FUNCTIONS if known is registry), "")
        for name in (name for name in registry if function and name not in entries):
            options = registry[name]
            if not isinstance(name, str) or name != name.strip().lower():
                raise ValueError(f'{options.__name__}: its name is `name: Literal["..."] = "..."`, in lower case')
            if not options.module:
                raise ValueError(f"{name}: its functions are in `module: ClassVar[str] = __name__`")
            if not callable(getattr(import_module(options.module), function, None)):
                raise ValueError(f"{name}: its module has no function {function}")


def _complaint(file: str, error: BaseException) -> str:
    """Where in the file, and what it raised, in one line."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if isinstance(error, SyntaxError) and error.filename == file and error.lineno:
        lines.append(error.lineno)
    at = f", line {lines[-1]}" if lines else ""
    if isinstance(error, SystemExit):
        return f"{at}: exits (code {error.code}); a plugin registers what it has and returns"
    return f"{at}: {' '.join(traceback.format_exception_only(error)[-1].split())}"
