"""What the fuzzers share: hostile values, mutations of trees and bytes, and a limit of time on every case.

A case is a function of a seed alone, so that a failure is told by its kind and seed:
`python -m tests.fuzz.soak recipes --only KIND --seed SEED`.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from compress.errors import CompressError

SECONDS = 5.0
"""Of the processor, in which a case is refused or done; waiting for what never comes counts, too, once it takes WAIT."""
WAIT = 30.0

LINES, LENGTH = 60, 2000
"""Of an error: as many lines, of as many characters."""

Case = Callable[[random.Random, Path], None]
"""Damages something in a folder of its own and reads it."""


class Hang(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Failure:
    """A case that was neither done nor refused in words."""

    kind: str
    seed: int
    what: str

    def __str__(self) -> str:
        return f"{self.kind}, seed {self.seed}: {self.what}"


@contextmanager
def limited(seconds: float = SECONDS, wait: float = WAIT) -> Iterator[None]:
    """Raises Hang in the block when either time is up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, wait))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def attempt(kind: str, case: Case, seed: int, folder: Path) -> Failure | None:
    """One case; None when it went well or was refused by an error of ours that a terminal can show."""
    try:
        with limited():
            case(random.Random(f"{kind}/{seed}"), folder)
    except CompressError as error:
        lines = str(error).splitlines()
        if not lines or len(lines) > LINES or max(map(len, lines)) > LENGTH:
            return Failure(kind, seed, f"an error of {len(lines)} lines: {str(error)[:200]!r}")
        if not all(line.isprintable() for line in lines):
            return Failure(kind, seed, f"an error that no terminal can show: {str(error)[:200]!r}")
    except Hang:
        return Failure(kind, seed, f"took more than {SECONDS:g} s")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).splitlines() or [""]
        return Failure(
            kind, seed, f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {said[0][:200]}"
        )
    return None


# ------------------------------------------------------------------------------------------ mutations

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 2**64, -(10**9), 10**39, 0.5, -0.5, 1.5, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", " ", "x", "0", "-1", "1e9", "null", "true", ".nan", "nan", "a/b", "..", "../x",
    "/", "/etc/passwd", "~", "~nobody", "~/x", "x" * 300, "x" * 5000, "\0", "\x1b[31m", "\ud800", "é" * 200, "日本語", "a\nb", "[", "{", "%s",
    "{}", "{0.__class__}", "re:", "re:(", "re:(a+)+$", "re:(?=x)", "re:.*", "re:" + "(" * 600, "re:a{1000}{1000}", "first 1/0",
    "last 99999999999", "5-2", "0-1", [], [[]], [None], [0], [-1], [1, 2, 3], ["x"], [0.5], [{}], list(range(2000)), {}, {"a": {}},
    {"a": 1}, {"name": 1}, {"name": "gptq"}, {"name": []}, {"": None}, {"type": "yarn"}, {"rope_type": "yarn", "factor": 0},
    {"quant_method": []},
)  # fmt: skip


def hostile(rng: random.Random) -> Any:
    """A value that few places expect."""
    if rng.random() < 0.05:
        depth = rng.choice((3, 40, 200))
        value: Any = _copied(rng.choice(VALUES))
        for _ in range(depth):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return _copied(rng.choice(VALUES))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree of mappings and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutated(rng: random.Random, tree: Any, names: tuple[str, ...] = ()) -> Any:
    """A tree with a few of its values, keys or items changed; names: of keys that may be put in. Changes `tree` itself."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        inside = [path for path in places(tree) if path]
        if not inside or not isinstance(tree, dict | list):
            return hostile(rng)
        *way, key = rng.choice(inside)
        here = tree
        for part in way:
            here = here[part]
        do = rng.random()
        if do < 0.5:
            here[key] = hostile(rng)
        elif do < 0.6:
            del here[key]
        elif do < 0.7:
            here[key] = [here[key]] if rng.random() < 0.5 else {"a": here[key]}
        elif do < 0.8 and isinstance(here, list):
            here.extend(_copied(here[key]) for _ in range(rng.choice((1, 2, 50))))
        elif do < 0.9 and isinstance(here, dict):
            here[rng.choice((*names, "x", "", str(hostile(rng))[:50]))] = hostile(rng)
        elif isinstance(here[key], int | float) and not isinstance(here[key], bool):
            here[key] = rng.choice((-here[key], here[key] + 1, here[key] * 10**6, here[key] / 3, str(here[key])))
        else:
            here[key] = places_value(rng, tree)
    return tree


def places_value(rng: random.Random, tree: Any) -> Any:
    """A value from another place of the tree, copied."""
    value = tree
    for part in rng.choice(list(places(tree))):
        value = value[part]
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def scrambled(rng: random.Random, data: bytes, words: tuple[bytes, ...]) -> bytes:
    """Bytes with some flipped, cut out, repeated, or replaced by words of the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        do = rng.random()
        if do < 0.3:
            out[at:at] = rng.choice(words)
        elif do < 0.5 and out:
            out[min(at, len(out) - 1)] = rng.randrange(256)
        elif do < 0.7:
            del out[at : at + rng.choice((1, 3, 20, 200))]
        elif do < 0.8:
            out[at:at] = out[at : at + rng.choice((1, 20, 200))] * rng.choice((1, 2, 30))
        elif do < 0.9:
            out[at:at] = rng.choice(words) * rng.choice((10, 100, 5000))
        else:
            del out[at:]
    return bytes(out)
