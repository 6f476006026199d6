"""Containers: the files that ship, one format a module."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def container_module(container: str) -> ModuleType:
    """The module that writes and reads a container; YAML names may have dashes."""
    return import_module(f"compress.containers.{container.replace('-', '_')}")
