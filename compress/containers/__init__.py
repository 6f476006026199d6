"""Containers: the files that ship, one format a module, found by themselves.

A module of this folder without a leading underscore that has a `CONTAINER` is one; `register` adds those from outside
(docs/adding-a-container.md is a worked example). No torch.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from compress.codecs.names import KIND_NAMES
from compress.containers._atomic import atomic_files, atomic_folder
from compress.containers.base import (
    TRANSFORMERS,
    Container,
    Counted,
    Engine,
    Host,
    Options,
    Use,
    WriteRequest,
    folder_of,
)

__all__ = [
    "CONTAINERS",
    "TRANSFORMERS",
    "Container",
    "Counted",
    "Engine",
    "Host",
    "Options",
    "Use",
    "WriteRequest",
    "activation_problem",
    "atomic_files",
    "atomic_folder",
    "folder_of",
    "incoherence_problem",
    "original_layout",
    "packed_layout",
    "register",
]


def _found() -> list[Container]:
    names = (info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    modules = (import_module(f"{__name__}.{name}") for name in names)
    return [module.CONTAINER for module in modules if hasattr(module, "CONTAINER")]


CONTAINERS: dict[str, Container] = {c.name: c for c in sorted(_found(), key=lambda c: (c.rank, c.name))}
"""Every container by its name, in the order of lists: ranks, then as they were registered."""


def register(container: Container) -> None:
    """Add a container from outside this package.

    Raises ValueError when its name is taken or not lower case, or it names a kind of codec that there is not.
    """
    if container.name in CONTAINERS:
        raise ValueError(f"there is a container called {container.name} already; give yours another name")
    if container.name != container.name.strip().lower() or not container.name:
        raise ValueError(f"{container.name!r}: names of containers are written in lower case")
    if unknown := sorted(container.kinds - set(KIND_NAMES)):
        raise ValueError(f"{container.name}: no codec is of kind {unknown[0]!r}; kinds: {', '.join(KIND_NAMES)}")
    CONTAINERS[container.name] = container


def original_layout() -> Container:
    """What original checkpoints are in."""
    return next(c for c in CONTAINERS.values() if c.original)


def packed_layout() -> Container:
    """The container that holds every codec as it is: what codes are counted in where a recipe writes none."""
    return next(c for c in CONTAINERS.values() if not c.dense and c.kinds >= set(KIND_NAMES))


def activation_problem(container: Container) -> str | None:
    """Why a container cannot hold a rule with activations, or None."""
    if container.activations:
        return None
    others = [other.name for other in CONTAINERS.values() if other.activations]
    return f"container {container.name} says nothing about activations; use {' or '.join(others)}"


def incoherence_problem(container: Container) -> str | None:
    """Why a container cannot hold codes between Hadamard transforms, or None."""
    if container.incoherence:
        return None
    others = [other.name for other in CONTAINERS.values() if other.incoherence]
    return f"container {container.name} has no place for the signs of incoherence; use {' or '.join(others)}"
