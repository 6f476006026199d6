"""What tests of whole runs share as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from compress import codecs, plugins
from compress.codecs import names
from compress.containers import CONTAINERS
from compress.models import spec
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS
from compress.transforms.options import SCALINGS

REGISTRIES = (
    plugins._loaded, names._REGISTERED, codecs._REGISTERED, spec._REGISTERED, CONTAINERS, SOLVERS, PRUNERS, FACTORIZERS, SCALINGS,
)  # fmt: skip


@pytest.fixture
def forget_plugins() -> Iterator[Callable[[], None]]:
    """A call that puts all registries back to what they were before the test, as they are behind it, too: files that run
    as plugins then need no process of their own, which imports torch first."""
    before = [dict(registry) for registry in REGISTRIES]

    def forget() -> None:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)
        codecs.get_codec.cache_clear()
        names.codec_info.cache_clear()

    yield forget
    forget()
