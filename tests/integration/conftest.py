"""What tests of whole runs share as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from compress import plugins
from tests.integration.runs import Compress, command


@pytest.fixture
def forget_plugins() -> Iterator[Callable[[], None]]:
    """A call that puts all registries back to what they were before the test, as they are behind it, too: files that run
    as plugins then need no process of their own, which imports torch first."""
    before = plugins.registered()

    def forget() -> None:
        plugins.restore(before)

    yield forget
    forget()


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Compress:
    """The command line in this process."""
    return lambda *arguments: command(monkeypatch, capfd, *map(str, arguments))
