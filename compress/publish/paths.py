"""Paths of this machine in what would be published. They name people and places, and help nobody elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

HEAD = 64 << 20
"""Bytes that are searched of files that hold weights: metadata and tokenizer come before them."""
WEIGHTS = (".gguf", ".safetensors")
"""Suffixes of such files."""
_BEFORE = re.compile(rb"(?:[^\w.-]|\\[nrt]|^)\Z")  # JSON spells line ends with letters
_BEFORE_ANY = re.compile(rb"(?:[^\w.~:/%-]|\\[nrt]|file://|^)\Z")
_AFTER = re.compile(rb"(?![\w-]|\.\w)")
_PATH = re.compile(rb"/(?:[\w.+@-]+/)+[\w.+@-]*")
_EVERYWHERE = (b"/dev/", b"/proc/", b"/usr/", b"/etc/", b"/bin/")


def private_places(folder: Path) -> tuple[str, ...]:
    """Folders whose paths stay here: the run's, the working one, the user's own."""
    found = (str(folder.absolute()), str(folder.resolve()), os.getcwd(), str(Path.home()), str(Path.home().resolve()))
    return tuple(dict.fromkeys(place for place in found if len(Path(place).parts) > 1))


def private_path(text: bytes, places: Sequence[str], *, own: bool) -> str | None:
    """The first of `places`, or a path below it, that a file's bytes hold; None where they hold none.

    own: whether the run wrote the file's words: then no absolute path that exists on this machine may be in it. In what came
    along with the original a folder at the top of a machine, as /root or /data, is somebody else's and says nothing.
    """
    for place in places:
        if own or len(Path(place).parts) > 2:
            for spelled in {place, place.replace("/", "\\/")}:
                if (start := _found(text, spelled.encode())) is not None:
                    return _shown(text, start)
    for match in _PATH.finditer(text) if own else ():
        if match[0].startswith(_EVERYWHERE) or not _BEFORE_ANY.search(_left(text, match.start())):
            continue
        if os.path.exists(match[0].rstrip(b".")):
            return _shown(text, match.start())
    return None


def _found(text: bytes, place: bytes) -> int | None:
    """Where a path stands that is this one or below it."""
    start = text.find(place)
    while start >= 0:
        if _BEFORE.search(_left(text, start)) and _AFTER.match(text, start + len(place)):
            return start
        start = text.find(place, start + 1)
    return None


def _left(text: bytes, at: int) -> bytes:
    """What is left of a place, as much as tells whether a path begins there; "" at the beginning."""
    return text[max(at - 8, 0) : at]


def _shown(text: bytes, start: int) -> str:
    """The path that begins there."""
    found = re.match(rb"[\w.+@/\\-]+", text[start : start + 200])
    return found[0].decode(errors="replace") if found else ""
