"""Every fuzzer, thousands of times: `make soak`. Tells the kind and seed of every failure; exits with 1 where there are any.

python -m tests.fuzz.soak [recipes | checkpoints | runs ...] [--count 10000] [--seed 0] [--only KIND]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import checkpoints, recipes
from tests.fuzz.harness import Case, Failure, attempt

SOURCES: dict[str, tuple[dict[str, Case], Callable[[], None]]] = {
    "recipes": (recipes.KINDS, recipes.prepare),
    "checkpoints": (checkpoints.KINDS, checkpoints.prepare),
    "runs": ({"run": checkpoints.run}, checkpoints.prepare),
}
"""What there is to fuzz, and what is made before."""


def fuzz(kinds: dict[str, Case], count: int, first: int = 0) -> list[Failure]:
    """`count` cases, every kind in turn, from seed `first` on."""
    failures = []
    for seed in range(first, first + count):
        kind = list(kinds)[seed % len(kinds)]
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            failures.append(attempt(kind, kinds[kind], seed, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return [failure for failure in failures if failure is not None]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", nargs="*", default=["recipes", "checkpoints"], help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    given = parser.parse_args()  # `choices` would hold the whole default against them
    if unknown := set(given.sources) - set(SOURCES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    total = 0
    for source in given.sources:
        kinds, prepare = SOURCES[source]
        prepare()
        if given.only:
            kinds = {given.only: kinds[given.only]}
        start = time.monotonic()
        failures = fuzz(kinds, given.count, given.seed)
        for failure in failures:
            print(f"  {failure}", flush=True)
        tally = Counter(failure.what.split(":")[0] for failure in failures)
        seconds = time.monotonic() - start
        print(
            f"{source}: {given.count} cases, {len(failures)} failures in {seconds:.0f} s {dict(tally) or ''}",
            flush=True,
        )
        total += len(failures)
    return int(total > 0)


if __name__ == "__main__":
    raise SystemExit(main())
