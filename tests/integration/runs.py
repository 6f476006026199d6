"""What the tests of whole runs share: small recipes, a calibration text, the command line, an independent reader."""

from __future__ import annotations

import copy
import hashlib
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.decode import decode
from compress.models import ModelSpec
from compress.plan import make_plan
from compress.recipe import Recipe, load_recipe
from compress.report.scorecard import Scorecard
from compress.run import WORK, run
from compress.streaming.journal import Journal
from tests.tiny import demo_model

_WORDS = (
    "the of and to in a was that it his her with as had for on she at but not be is they from him which were all "
    "house river old king stone winter letter night garden road village mother captain ship island morning silver "
    "door window table horse forest mountain city war music number century north south built known called first"
).split()  # noqa: SIM905
JUDGED = {"scorecard.json", "recipe.json", "tensors.jsonl"}
"""What lies in the folder of a finished run beside what it made, whatever its gate said."""
TOLD = {*JUDGED, "README.md", "reproduce.json"}
"""The same where the gate was passed."""
SMALL = ("calibration.samples=4", "calibration.length=64", "score=false")
"""Overrides that make a run take about a second; `calibration.dataset` comes on top."""


def text_file(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """A calibration text of random words, so that tokens vary and nothing bundled has to be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(random.Random(seed).choices(_WORDS, k=words)) + ".")
    return path


def small(recipe: str | Path, model: Path, output: Path, *overrides: str) -> Recipe:
    """`recipe` on `model`, shrunk; the calibration text lies beside the output folder."""
    text = output.parent / "calibration.txt"
    if not text.exists():
        text_file(text)
    sets = (*SMALL, f"calibration.dataset={text}", *overrides)
    return load_recipe(str(recipe), sets, model=str(model), output=str(output))


_REFINEMENT = {"sweeps": 0, "refits": 0, "iterations": 1, "rounds": 1, "grid": 4}


def cheap(name: str, refinement: Mapping[str, int] = _REFINEMENT) -> tuple[str, ...]:
    """Overrides that leave so much of a bundled recipe's slow refinement, where its steps and solvers have one."""
    return tuple(
        f"steps[{at}].{place}.{option}={value}"
        for at, step in enumerate(load_recipe(name).steps)
        for place, options in (
            (step.kind, step.options),
            (f"{step.kind}.solver", getattr(step.options, "solver", None)),
        )
        for option, value in refinement.items()
        if hasattr(options, option)
    )


def carry_out(recipe: Recipe, **options: Any) -> Scorecard:
    """Run quietly."""
    return run(recipe, **options)


def kept(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a run with keep_work=True solved: every tensor decoded from its journal, float32."""
    journal = Journal.open(Path(recipe.output) / WORK, make_plan(recipe).digest)
    out = {}
    for tensor in make_plan(recipe).tensors:
        out[tensor.name] = decode(journal.fetch(tensor.name))
    return out


def as_model(weights: Mapping[str, torch.Tensor], source: Path, folder: Path) -> Path:
    """A Hugging Face folder with these weights in float32 and the configuration of `source`."""
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({n: w.float().contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Median over tokens of KL(reference || other) in nats; both are logits [tokens, vocab]. The mean of random models
    with experts is ruled by the few tokens that rounding sends to another expert."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).median())


def without_times(journal: Journal) -> dict[str, Any]:
    """What a journal says of its units, but for how long each tensor took."""
    units = copy.deepcopy(journal.units)
    for solved in (line for unit in units.values() for line in unit.get("solved", ())):
        del solved["seconds"]
    return units


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    """Entries of a folder, empty if there is none."""
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def final_names(output: Path) -> set[str]:
    """What lies in a run's folder under a final name: all but the work folder."""
    return names(output) - {WORK}


Compress = Callable[..., tuple[int, str, str]]
"""Arguments of the command line -> exit code, standard output, standard error."""


def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from compress.cli import main

    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def demo_blocks(folder: Path, layers: int, experts: int = 12) -> Path:
    """The demo model cut to its first blocks, and in each to its first experts."""
    import json
    import re

    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    for file in demo_model().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    weights = load_file(demo_model() / "model.safetensors")
    within = lambda kind, name, count: (m := re.search(rf"{kind}\.(\d+)\.", name)) is None or int(m[1]) < count  # noqa: E731
    cut = {n: w for n, w in weights.items() if within("layers", n, layers) and within("experts", n, experts)}
    cut |= {n: w[:experts].clone() for n, w in cut.items() if n.endswith("mlp.gate.weight")}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((demo_model() / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "num_experts": experts}))
    return folder


def spec_of(folder: Path) -> ModelSpec:
    import json

    from compress.models import load_spec

    return load_spec(json.loads((folder / "config.json").read_text()))
