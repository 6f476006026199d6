"""Solved tensors on disk, codes and scales apart, for the stage that tunes them once the whole model is known.

What a tensor ships as cannot give them back: most formats pack scales and codes so that only the decoder needs to know
them apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.codecs.grid import STORED
from compress.errors import ResumeError
from compress.files import write_synced
from compress.solve.tensor import Outcome, Solved
from compress.solvers.base import Solution
from compress.streaming.journal import SEPARATOR
from compress.transforms.incoherence import Incoherence

_NARROWER = (torch.int8, torch.float16)


def save_outcomes(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write tensors by checkpoint name; units in the narrowest type that holds them exactly."""
    from safetensors.torch import save

    parts: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for name, outcome in outcomes.items():
        solution, grid = outcome.solution, outcome.solution.grid
        given = {f"grid.{key}": value for key, value in grid.tensors().items()} | {"units": _narrow(solution.units)}
        if outcome.order is not None:
            given["order"] = outcome.order
        if outcome.incoherence is not None:
            given |= {"signs_in": outcome.incoherence.signs_in, "signs_out": outcome.incoherence.signs_out}
        given = {key: value.clone().contiguous() for key, value in given.items()}  # none may be shared
        parts |= {f"{name}{SEPARATOR}{key}": value for key, value in given.items()}
        facts = {key: getattr(solution, key) for key in ("damping", "retries", "error")}
        facts |= {"codec": solution.codec.name, "grid": type(grid).__name__, "report": vars(outcome.report)}
        meta[name] = json.dumps({**facts, "parts": list(given)})
    write_synced(path, save(parts, metadata=meta or None))


def load_outcomes(path: Path) -> dict[str, Outcome]:
    """What `save_outcomes` wrote, bit for bit. Raises ResumeError where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            meta = {name: json.loads(facts) for name, facts in (file.metadata() or {}).items()}
            tensors = {
                name: {part: file.get_tensor(f"{name}{SEPARATOR}{part}") for part in facts["parts"]}
                for name, facts in meta.items()
            }
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} is missing or damaged ({error}); start over with --fresh") from None
    return {name: _outcome(meta[name], tensors[name]) for name in sorted(meta)}  # the file has no order


def _outcome(facts: Mapping, parts: Mapping[str, Tensor]) -> Outcome:
    if facts["grid"] not in STORED:
        raise ResumeError(f"a solved tensor has a grid {facts['grid']!r}, of another version; start over with --fresh")
    units = parts["units"].float()
    codec = block_codec(facts["codec"], units.shape[1])
    grid = STORED[facts["grid"]](**{k.removeprefix("grid."): v for k, v in parts.items() if k.startswith("grid.")})
    solution = Solution(units, grid, codec, facts["damping"], facts["retries"], facts["error"])
    signs = Incoherence(parts["signs_in"], parts["signs_out"]) if "signs_in" in parts else None
    return Outcome(solution, signs, Solved(**facts["report"]), parts.get("order"))


def _narrow(units: Tensor) -> Tensor:
    """Units in the smallest type that gives them back, the sign of a zero included."""
    for dtype in _NARROWER:
        small = units.to(dtype)
        if torch.equal(small.float().view(torch.int32), units.contiguous().view(torch.int32)):
            return small
    return units
