"""Golden hashes: sha256 of every artifact of every bundled recipe on tiny models, and what the files decode to.

    python -m tests.golden.artifacts            # write tests/golden/artifacts.json anew
    python -m tests.golden.artifacts NAME ...   # only these cases

A change of bytes is either a defect or a commit of its own that says why and carries the new file. Another processor or
another torch may round differently: on such a platform the test compares decoded values instead (`fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.recipe import bundled_recipes, load_recipe
from compress.run import run
from tests.integration.runs import SMALL, cheap, demo_blocks, text_file
from tests.tiny import tiny_model

FILE = Path(__file__).with_name("artifacts.json")
# A code that falls on the other side of a border moves a weight by one step: a hundredth of the weights one step off at 2
# bits is about 2% of a tensor's norm. A wrong order of rows, a lost scale or a sign is of the order of the norm itself.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """One recipe on one model; blocks: of the demo model, else a random model of `family` with config keys `config`."""

    recipe: str
    family: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.recipe, self.family, *map(str, self.config.values())) if part)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
MOE = {"hidden_size": 256, "moe_intermediate_size": 256}
CASES = (
    *(Case(name) for name in sorted(set(bundled_recipes()) - {"awq-gguf-q4-k-m", "trellis-2bit"})),
    Case("awq-gguf-q4-k-m", overrides=("steps[0].awq.grid=4",)),
    Case("trellis-2bit", "qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 2}),
    Case("gguf-q4-k-m", "llama", {**WIDE, "tie_word_embeddings": True}),
    Case("gguf-q4-k-m", "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 256}),
    Case("moe-2bit", "mixtral", {"hidden_size": 256, "intermediate_size": 256}),
    Case("awq-gptq-w4-g128", "qwen2", {"hidden_size": 128, "intermediate_size": 128}),
    Case("rotate-w4-g128", "llama", {"hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": True}),
    Case("structured-25", "llama", {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4}),
    Case("structured-25", "qwen2_moe", {"num_key_value_heads": 4}),
    Case("quip-2bit", "qwen3", {"hidden_size": 64}),
    Case("nf4-solved", "mistral", {"hidden_size": 64, "intermediate_size": 128}),
    Case(
        "int8-w8a8", "qwen3", {"hidden_size": 64}, ("export=[{container: compressed-tensors}, {container: compress}]",)
    ),
)


def platform_facts() -> dict[str, str]:
    """What decides how floats round: hashes hold where all of it agrees."""
    return {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
    }


def artifacts(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """Run a case; by file of every artifact its sha256 and, of weight files, the fingerprint."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with chdir(folder):  # files name their model and calibration text: as they do here, on every machine
            run(_recipe(case, folder))
    finally:
        torch.set_num_threads(threads)
    found = {}
    for file in sorted(
        p for p in (folder / "out").rglob("*") if p.suffix in (".gguf", ".safetensors") or _is_config(p)
    ):
        entry: dict[str, Any] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        if file.suffix != ".json":
            entry["values"] = fingerprint(file)
        found[str(file.relative_to(folder / "out"))] = entry
    return found


def _is_config(path: Path) -> bool:
    return path.name in ("config.json", "quantize_config.json")


def _recipe(case: Case, folder: Path) -> Any:
    text = bundled_recipes()[case.recipe].read_text()
    text_file(folder / "calibration.txt")
    if case.family:
        tiny_model(case.family, folder / "model", **case.config)
    else:  # one block of either kind, or one to drop
        demo_blocks(folder / "model", 2 if "layers:" in text or "drop_layers" in text else 1)
    quick = [option.replace("=0", "=1") for option in cheap(case.recipe)]  # one sweep, one refit
    sets = (*SMALL, "calibration.dataset=calibration.txt", *quick, *case.overrides)
    return load_recipe(case.recipe, sets, model="model", output="out")


def fingerprint(file: Path) -> dict[str, list[float]]:
    """Of all tensors that differ in numbers of layers and experts only: root mean square of the values, and that of a
    seeded sum over runs of 16, which feels order and signs."""
    sums: dict[str, list[float]] = {}
    for name, values in _values(file):
        flat = values.reshape(-1).astype(np.float64)
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=16)
        runs = np.resize(flat, -(-flat.size // 16) * 16).reshape(-1, 16) @ signs
        entry = sums.setdefault(re.sub(r"\.\d+\.", ".#.", re.sub(r"\.\d+\.", ".#.", name)), [0.0, 0.0, 0.0])
        for i, part in enumerate((flat.size, float(flat @ flat), float(runs @ runs))):
            entry[i] += part
    return {name: [float(f"{np.sqrt(s / n):.7g}") for s in (a, b)] for name, (n, a, b) in sums.items()}


def _values(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and numbers of a file: decoded where it is a GGUF, as stored where it is safetensors."""
    if file.suffix == ".gguf":
        import gguf

        for tensor in gguf.GGUFReader(file).tensors:
            yield tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type)
        return
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            values = tensors.get_tensor(name)
            yield name, (values.double() if values.is_floating_point() else values.long()).numpy()


def main(names: list[str]) -> None:
    """Write the file, or only what it says of some cases."""
    stored = json.loads(FILE.read_text())["cases"] if names and FILE.exists() else {}
    for case in CASES:
        if not names or case.name in names:
            with tempfile.TemporaryDirectory() as folder:
                stored[case.name] = artifacts(case, Path(folder))
                print(case.name, *stored[case.name])
    FILE.write_text(json.dumps({"platform": platform_facts(), "cases": stored}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
