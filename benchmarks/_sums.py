"""Writes eval/sums.jsonl.xz: arithmetic word problems of one and two steps, drawn with a seed; every answer is a whole number.

    python -m benchmarks._sums

Text and numbers are this project's own (Apache-2.0). Names, things and numbers are drawn independently, so that nothing but
the arithmetic tells the answer. Each row: {"question", "answer", "steps"}.
"""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

COUNT, SEED = 300, 11
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ines Jonas Kira Leo Mara Noah Olga Paul Rosa Sam Tessa Victor".split()
)
THINGS = "apples books coins cups eggs flowers marbles pencils plums shells stamps stones tickets toys".split()


def one_step(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b = rng.randint(2, 20), rng.randint(2, 12)
    return rng.choice((
        (f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", a + b),
        (f"{name} has {a + b} {thing} and gives away {b}. How many {thing} does {name} have left?", a),
        (f"There are {b} boxes with {a} {thing} in each. How many {thing} are there in all?", a * b),
        (f"{name} shares {a * b} {thing} equally among {b} friends. How many {thing} does each friend get?", a),
    ))  # fmt: skip


def two_steps(rng: random.Random, name: str, thing: str) -> tuple[str, int]:
    a, b, c = rng.randint(5, 20), rng.randint(2, 9), rng.randint(2, 9)
    return rng.choice((
        (f"{name} has {a} {thing}, buys {b} more and then loses {c}. How many {thing} does {name} have now?", a + b - c),
        (f"{name} has {a} {thing}. A friend has {b} times as many. How many {thing} do they have together?", a + a * b),
        (f"{name} buys {b} bags with {a} {thing} in each and loses {c}. How many {thing} are left?", a * b - c),
    ))  # fmt: skip


def problems() -> list[dict[str, object]]:
    """Both kinds in turns, none twice."""
    rng, found = random.Random(SEED), {}
    while len(found) < COUNT:
        steps = 1 + len(found) % 2
        question, answer = (one_step, two_steps)[steps - 1](rng, rng.choice(NAMES), rng.choice(THINGS))
        found.setdefault(
            question, {"question": question, "answer": str(answer), "steps": f"{steps} step" + "s" * (steps > 1)}
        )
    return list(found.values())


def main() -> None:
    data = "".join(json.dumps(row) + "\n" for row in problems()).encode()
    path = Path(__file__).resolve().parents[1] / "eval" / "sums.jsonl.xz"
    path.write_bytes(lzma.compress(data, preset=9))


if __name__ == "__main__":
    main()
