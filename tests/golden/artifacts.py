"""Golden hashes: sha256 of every artifact of every bundled recipe on tiny models, what it holds and what it computes.

    python -m tests.golden.artifacts            # write tests/golden/artifacts.json anew, and say what changed
    python -m tests.golden.artifacts NAME ...   # only these cases

A change of bytes is either a defect or a commit of its own that says why and carries the new file. Another processor or
another torch rounds differently, and a choice that hangs on a rounding goes the other way: on such a platform the test
compares fingerprints instead, within TOLERANCES.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors import safe_open

from compress.engines.open import file_container, open_model
from compress.errors import CompressError
from compress.export.verify import check_windows
from compress.models.forward import embedded, final_norm, forward_branch, logits
from compress.models.spec import ModelSpec
from compress.plan import make_plan
from compress.plan.plan import Plan
from compress.recipe import Recipe, bundled_recipes, load_recipe
from compress.report.scorecard import Scorecard
from compress.run import run
from compress.streaming.walk import walk
from compress.transforms.options import TransformOptions
from compress.weights import Loader
from tests.integration.runs import SMALL, cheap, demo_blocks, text_file
from tests.tiny import tiny_model

FILE = Path(__file__).with_name("artifacts.json")
BUCKETS = 64
Numbers = Iterable[tuple[str, np.ndarray]]
Fingerprints = dict[str, list[float]]


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of root mean squares and largest distance, both relative to what is wanted."""

    rms: float
    distance: float


# Measured, all cases: Intel with AVX-512 against AMD with AVX2 (decoded GGUFs, vectors), and AMD with AVX2 against SSE.
#                     root mean square    distance
# vectors             0.001               0.003; tuned norms, all others nothing
# matrices            0.004               0.76 (a sketch of 24 buckets), 0.58; 2 bits on random weights, where error feedback
#                                         carries one flipped code on. On the demo model 0.66 at most
# outputs             0.007               0.46; 2 bits on random weights. On the demo model 0.07 at most
# outputs, scaled     0.001               0.15
# Rows or columns in another order are at 1.41, a wrong sign at 2, unless few weights or a small part of a sum are wrong;
# sketches tell a distance to a tenth. Two roundings of one matrix are at most sqrt(2) times their error from each other.
# What is stored is not compared: its scales differ by a third where factors turn, or where AWQ scales an expert that saw few
# tokens otherwise. Of a model that a step scales (its decoded values: 0.19, 0.33), only outputs are compared.
VALUES = {"vectors": Tolerance(rms=0.02, distance=0.05), "matrices": Tolerance(rms=0.03, distance=1.0)}
OUTPUTS = {"outputs": Tolerance(rms=0.05, distance=0.8)}
SCALED_OUTPUTS = {"outputs": Tolerance(rms=0.05, distance=0.4)}


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

    @property
    def tolerances(self) -> Mapping[str, Tolerance]:
        """By kind of fingerprint: what is compared on other platforms, and how closely."""
        scaled = any(isinstance(step.options, TransformOptions) for step in load_recipe(self.recipe).steps)
        return SCALED_OUTPUTS if scaled else {**VALUES, **OUTPUTS}


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
MOE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1}
EXPERTS = 4
"""Of the demo model, which has twelve: a token chooses two, and a quarter of four can go."""
REFINEMENT = {"sweeps": 1, "refits": 1, "iterations": 2, "rounds": 2, "grid": 4}
"""As little of what solvers repeat as takes every way through them."""
CASES = (
    *(Case(name) for name in sorted(set(bundled_recipes()) - {"trellis-2bit"})),
    Case(
        "trellis-2bit",
        "qwen3_moe",
        {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 2, "num_hidden_layers": 1},
    ),
    Case("gguf-q4-k-m", "llama", {**WIDE, "tie_word_embeddings": True}),
    Case("gguf-q4-k-m", "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 256}),
    Case("moe-2bit", "mixtral", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}),
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


@dataclass(frozen=True)
class Outcome:
    """A case that was carried out in `folder`. The plan's paths count from there."""

    case: Case
    folder: Path
    plan: Plan
    card: Scorecard

    @property
    def files(self) -> dict[str, Path]:
        """Weights and configurations among what was delivered, by their paths in it."""
        out = self.folder / "out"
        found = sorted(path for path in out.rglob("*") if _is_weights(path) or _is_config(path))
        return {str(path.relative_to(out)): path for path in found}

    @cached_property
    def sha256(self) -> dict[str, str]:
        """By file."""
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}


def carry_out(case: Case, folder: Path) -> Outcome:
    """Run a case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with chdir(folder):  # files name their model and calibration text: as they do here, on every machine
            recipe = _recipe(case, folder)
            return Outcome(case, folder, card=run(recipe), plan=make_plan(recipe))
    finally:
        torch.set_num_threads(threads)


def artifacts(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """By file of every artifact its sha256, that of its description and, of weight files, fingerprints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with chdir(outcome.folder):
            windows = check_windows(outcome.plan)
        return {
            name: {"sha256": outcome.sha256[name], **_entry(outcome.case, path, outcome.plan.spec, windows)}
            for name, path in outcome.files.items()
        }
    finally:
        torch.set_num_threads(threads)


def _is_weights(path: Path) -> bool:
    return path.suffix in (".gguf", ".safetensors")


def _is_config(path: Path) -> bool:
    return path.name in ("config.json", "quantize_config.json")


def _recipe(case: Case, folder: Path) -> Recipe:
    text = bundled_recipes()[case.recipe].read_text()
    text_file(folder / "calibration.txt")
    if case.family:
        tiny_model(case.family, folder / "model", **case.config)
    else:  # one block of either kind, or one to drop
        demo_blocks(folder / "model", 2 if "layers:" in text or "drop_layers" in text else 1, EXPERTS)
    sets = (*SMALL, "calibration.dataset=calibration.txt", *cheap(case.recipe, REFINEMENT), *case.overrides)
    return load_recipe(case.recipe, sets, model="model", output="out")


def _entry(case: Case, file: Path, planned: ModelSpec, windows: np.ndarray) -> dict[str, Any]:
    """planned: the model of a file that has no config.json beside it."""
    entry = {"content": hashlib.sha256(json.dumps(_description(file), sort_keys=True).encode()).hexdigest()}
    if _is_config(file):
        return entry
    if container := file_container(str(file)):
        spec, load = planned, container.open_dense([file], planned)
    else:
        model = open_model(str(file.parent))
        spec, load = model.spec, model.load
    prints = {"outputs": fingerprint(outputs(spec, load, windows))}
    if VALUES.keys() <= case.tolerances.keys():
        for kind, numbers in _by_kind(_values(file, spec, load)).items():
            prints[kind] = fingerprint(numbers)
    return {**entry, **{kind: prints[kind] for kind in case.tolerances}}


def _by_kind(values: Numbers) -> dict[str, Numbers]:
    """Vectors and matrices apart."""
    kinds: dict[str, list[tuple[str, np.ndarray]]] = {"vectors": [], "matrices": []}
    for name, x in values:
        kinds["vectors" if x.ndim < 2 else "matrices"].append((name, x))
    return kinds


def _description(file: Path) -> Any:
    """What a file says besides numbers: metadata, and the name, type and shape of everything stored."""
    if _is_config(file):  # without the version of transformers that wrote the model
        return {k: v for k, v in json.loads(file.read_text()).items() if k != "transformers_version"}
    if file.suffix == ".gguf":
        reader = gguf.GGUFReader(file)
        stored = [[tensor.name, tensor.tensor_type.name, tensor.shape.tolist()] for tensor in reader.tensors]
        return [{name: found.contents() for name, found in reader.fields.items()}, stored]
    with safe_open(file, "pt") as tensors:
        parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return [tensors.metadata(), {name: [part.get_dtype(), part.get_shape()] for name, part in parts.items()}]


def _values(file: Path, spec: ModelSpec, load: Loader) -> Numbers:
    """Names and decoded numbers of a file: by llama.cpp's own package where it is a GGUF."""
    if file.suffix == ".gguf":
        for tensor in gguf.GGUFReader(file).tensors:
            yield tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type)
    else:
        for tensor in spec.tensors():
            yield tensor.name, load(tensor.name).float().numpy()


def outputs(spec: ModelSpec, load: Loader, windows: np.ndarray) -> Numbers:
    """What every sub-layer adds to the residual stream and the logits; windows: token ids [samples, length]."""
    with torch.inference_mode():
        hidden = embedded(spec, load(spec.embeddings), torch.from_numpy(np.asarray(windows, dtype=np.int64)))
        for block in walk(spec, load):
            for place, branch in enumerate(block.branches):
                after = forward_branch(branch, block.of(branch), hidden)
                assert after is not None
                yield f"block {block.layer} sub-layer {place}", (after - hidden).numpy()
                hidden = after
        states = final_norm(spec, load(spec.final_norm).float(), hidden)
        yield "logits", logits(spec, load(spec.head).float(), states).numpy()


def fingerprint(numbers: Numbers) -> Fingerprints:
    """Of all that differ in numbers of layers and experts only: root mean square, then a sketch.

    The sketch sums values with signs seeded by the tensor's name into BUCKETS. It is linear: the norm of the difference
    of two sketches estimates the root mean square of the difference of the values, which feels order, signs and places.
    """
    sums: dict[str, np.ndarray] = {}
    for name, values in numbers:
        flat = values.reshape(-1).astype(np.float64)
        signs = 2.0 * np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, flat.size, dtype=np.int8) - 1.0
        signed = np.pad(flat * signs, (0, -flat.size % BUCKETS)).reshape(-1, BUCKETS).sum(0)
        group = re.sub(r"\.\d+(?=\.)", ".#", name)
        sums[group] = sums.get(group, np.zeros(2 + BUCKETS)) + np.array([flat.size, flat @ flat, *signed])
    return {
        name: [float(f"{np.sqrt(square / n):.5g}"), *(float(f"{x:.3g}") for x in sketch / np.sqrt(n))]
        for name, (n, square, *sketch) in sums.items()
    }


def distance(found: list[float], wanted: list[float]) -> tuple[float, float]:
    """Of two fingerprints of a tensor, relative to `wanted`: difference of root mean squares, estimated distance."""
    unit = max(wanted[0], 1e-12)
    apart = np.subtract(found, wanted) / unit
    return abs(float(apart[0])), float(np.linalg.norm(apart[1:]))


@dataclass(frozen=True)
class Gap:
    """How far one fingerprint is from the wanted one; infinitely where only one of both is there, or another sketch."""

    name: str
    limit: Tolerance
    rms: float = math.inf
    distance: float = math.inf

    @property
    def share(self) -> float:
        """Of what is tolerated."""
        return max(self.rms / self.limit.rms, self.distance / self.limit.distance)

    def __str__(self) -> str:
        if math.isinf(self.share):
            return f"{self.name} on one side only"
        return f"{self.name} rms {self.rms:.2g} of {self.limit.rms:g}, distance {self.distance:.2g} of {self.limit.distance:g}"


def gaps(limits: Mapping[str, Tolerance], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Gap]:
    """Between two entries of a weight file, the farthest first."""
    between = []
    for kind, limit in limits.items():
        here, there = found.get(kind, {}), wanted.get(kind, {})
        for name in {**here, **there}:
            both = name in here and name in there and len(here[name]) == len(there[name])
            between.append(Gap(name, limit, *(distance(here[name], there[name]) if both else ())))
    return sorted(between, key=lambda gap: -gap.share)


def changes(case: Case, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """A line for every file of a case that is not what it was: bytes only, description, the value that moved farthest."""
    for name in sorted({**found, **wanted}):
        if name not in found or name not in wanted:
            yield f"{name}: {'new' if name in found else 'gone'}"
        elif found[name]["sha256"] != wanted[name]["sha256"]:
            what = ["description"] if found[name]["content"] != wanted[name].get("content") else []
            what += [
                f"values, farthest: {gap}"
                for gap in gaps(case.tolerances, found[name], wanted[name])[:1]
                if gap.share > 0
            ]
            yield f"{name}: {'; '.join(what) or 'bytes only'}"


def main(names: list[str]) -> int:
    """Write the file, or only what it says of some cases; the exit status.

    A case that fails keeps what was taken on this platform, and has nothing that was taken on another one.
    """
    here, before = platform_facts(), json.loads(FILE.read_text()) if FILE.exists() else {"platform": {}, "cases": {}}
    if unknown := set(names) - {case.name for case in CASES}:
        sys.exit(f"no case is called {', '.join(sorted(unknown))}")
    if names and before["platform"] != here:
        sys.exit("the other cases' hashes were taken on another platform; write all of them")
    taken, failed = dict(before["cases"]) if before["platform"] == here else {}, []
    for case in CASES:
        if names and case.name not in names:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                taken[case.name] = artifacts(carry_out(case, Path(folder)))
        except CompressError as error:
            failed.append(case.name)
            print(f"{case.name}: FAILED, {error}", flush=True)
            continue
        lines = list(changes(case, taken[case.name], before["cases"].get(case.name, {})))
        print(f"{case.name}: {'changed' if lines else 'as it was'}", *lines, sep="\n  ", flush=True)
    cases = {case.name: taken[case.name] for case in CASES if case.name in taken}
    text = json.dumps({"platform": here, "cases": cases}, indent=1)
    text = re.sub(r"\[[^\]\[]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)  # a line a tensor
    FILE.write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
