"""tensors.jsonl: what became of every tensor, a line each, for those who want to know where the error is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compress.plan.plan import Plan
from compress.solve.tensor import Solved


def tensor_records(plan: Plan, units: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One record a tensor in the order of the plan. units: the journal's reports.

    name, shape, role, layer (None outside the blocks), expert, codec, wanted (where another codec stands in for it), bytes; of
    those that were solved also solver, error (squared error over squared output on the calibration text, what solvers
    minimise), energy (that squared output), damping (as it was used), retries (of a gram that was not positive definite), tokens
    (that the statistics are of), borrowed (share of the statistics that is the layer's pool's) and seconds (beside others at the
    same time).
    """
    solved = {s["name"]: s for report in units.values() for s in report.get("solved", ())}
    for t in plan.tensors:
        record = {
            "name": t.name,
            "shape": list(t.spec.shape),
            "role": t.spec.role,
            "layer": t.spec.layer,
            "expert": t.spec.expert,
            "codec": t.codec,
            "wanted": t.wanted,
            "bytes": t.bytes,
        }
        yield record | {key: value for key, value in solved.get(t.name, {}).items() if key not in record}


def jsonl(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as lines of JSON."""
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def tensor_line(report: Solved) -> str:
    """A solved tensor in a line."""
    tokens = "" if report.tokens is None else f", {report.tokens:,} tokens"
    borrowed = f", {report.borrowed:.0%} borrowed" if report.borrowed else ""
    damping = f", damping {report.damping:g}" if report.damping else ""
    retries = f" after {report.retries} retries" if report.retries else ""
    return (
        f"{report.name}: {report.solver} -> {report.codec}, error {report.error:.3g}{damping}{retries}{tokens}{borrowed}, "
        f"{report.seconds:.2f} s"
    )
