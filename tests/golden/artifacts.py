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
import zlib
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from compress.recipe import bundled_recipes, load_recipe
from compress.run import run
from tests.integration.runs import SMALL, cheap, demo_blocks, text_file
from tests.tiny import tiny_model

FILE = Path(__file__).with_name("artifacts.json")
BUCKETS = 24
# Measured between AVX-512 and AVX2 kernels of one processor: half of the files differ, root mean squares by up to 8%,
# unpacked values by up to 60% of a tensor's norm (experts with few calibration tokens at 2 bits, whose feedback carries
# one flipped code on). Unrelated or reordered rows are at 141%, a wrong sign at 200%; a sketch of 24 buckets tells
# distances to about a seventh.
RMS_TOLERANCE = 0.15
DISTANCE_TOLERANCE = 0.9
# Positions mean nothing in these: bits are packed, values lie where a mask puts them, factors turn and change signs.
# Only their root mean square is compared, so row order of packed codes is proved by hashes alone.
PACKED = {"codes", "blocks", "values", "mask", "qweight", "qzeros"}


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
    """What decides how floats round and what libraries write: where all of it agrees, hashes must."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _processor() -> str:
    """Name, family and model, as Linux tells them (virtual machines leave the name vague)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", info.read_text(), re.MULTILINE))
    return " ".join(found.get(key, "?") for key in ("model name", "cpu family", "model"))


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
        if file.suffix == ".json":
            entry["content"] = _content(file)
        else:
            entry["values"] = fingerprint(file)
        found[str(file.relative_to(folder / "out"))] = entry
    return found


def _content(file: Path) -> str:
    """sha256 of a configuration without the version of transformers that wrote the model."""
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "transformers_version"}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


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
    """Of all tensors that differ in numbers of layers and experts only: root mean square, then, unless packed, a sketch.

    The sketch sums values with signs seeded by the tensor's name into BUCKETS. It is linear: the norm of the difference
    of two sketches estimates the root mean square of the difference of the values, which feels order, signs and places.
    """
    sums: dict[str, np.ndarray] = {}
    for name, values in _values(file):
        flat = values.reshape(-1).astype(np.float64)
        signs = 2.0 * np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, flat.size, dtype=np.int8) - 1.0
        signed = np.pad(flat * signs, (0, -flat.size % BUCKETS)).reshape(-1, BUCKETS).sum(0)
        group = re.sub(r"\.\d+(?=\.)", ".#", name)
        sums[group] = sums.get(group, np.zeros(2 + BUCKETS)) + np.array([flat.size, flat @ flat, *signed])
    return {
        name: [
            float(f"{x:.5g}")
            for x in (np.sqrt(square / n), *([] if name.rsplit(".", 1)[-1] in PACKED else sketch / np.sqrt(n)))
        ]
        for name, (n, square, *sketch) in sums.items()
    }


def distance(found: list[float], wanted: list[float]) -> tuple[float, float]:
    """Of two fingerprints of a tensor, relative to `wanted`: difference of root mean squares, estimated distance."""
    unit = max(wanted[0], 1e-12)
    apart = np.subtract(found, wanted) / unit
    return abs(float(apart[0])), float(np.linalg.norm(apart[1:]))


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
    text = json.dumps({"platform": platform_facts(), "cases": stored}, indent=1)
    text = re.sub(r"\[[^\]\[]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # a line a tensor
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
