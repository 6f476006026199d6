"""The floor of a run: what each stage of one block computes and moves, how long that takes at the machine's own limits, and how long
it takes.

    python benchmarks/stages.py                                     # a block of Qwen3-30B-A3B: an eighth of 131,072 tokens, 16 of 128 experts
    python benchmarks/stages.py --precision float32 --tokens 131072 --share 1 --experts 128      # all of it, for real
    python benchmarks/stages.py --shape demo

A random block of the shape is compressed as `qwen-moe-2bit` would, with `share` of the tokens; of the experts so many are solved, and
the seconds of both are scaled to the whole. Floating-point operations are those that torch counts, those of factorisations n^3 / 3
and n^3; bytes are those of activations and weights that are read and written. A stage's floor is its operations at the measured
rate of the products it is made of, or its bytes at that of the disk, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from compress.models import load_spec
from compress.models.checkpoint import Checkpoint
from compress.models.spec import Branch
from compress.plan import make_plan
from compress.plan.plan import Plan
from compress.plan.tensor import PlannedTensor
from compress.products import linear, rounded
from compress.recipe import load_recipe
from compress.run.collect import Site
from compress.run.sublayer import Job, Result
from compress.solve.together import Task
from compress.streaming.activations import Activations
from compress.streaming.placement import Placement
from compress.streaming.walk import Streams, advance, walk
from compress.text import data_root

sublayers: Any = import_module("compress.run.sublayer")
QWEN = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 4096, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "norm_topk_prob": True, "tie_word_embeddings": True, "dtype": "bfloat16", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
DEMO = data_root("models") / "tiny-qwen3-moe"
SHAPES = {"qwen3-30b-a3b": QWEN, "demo": None}
LENGTH = 512
FLOAT32, ROUNDED, DOUBLE = "float32", "bfloat16 factors", "float64"


@dataclass
class Stage:
    """What one part of a block took: seconds, operations by the kind of product, bytes that passed the disk; scaled to the whole
    text and all experts by `scale`."""

    seconds: float = 0.0
    operations: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    scale: float = 1.0


def random_model(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of one random block, in bfloat16, with the demo model's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    spec, generator = load_spec(config), torch.Generator().manual_seed(0)
    tensors = {}
    for tensor in spec.tensors():
        random = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        tensors[tensor.name] = (random if len(tensor.shape) > 1 else torch.ones(tensor.shape)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ceilings() -> dict[str, float]:
    """Measured limits: products in operations a second, copies in memory in bytes a second."""
    a, b = torch.randn(4096, 2048), torch.randn(2048, 2048)
    wide = b.double()

    def best(call: Callable[[], object]) -> float:
        call()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    product = 2 * 4096 * 2048**2
    found = {FLOAT32: product / best(lambda: linear(a, b)), DOUBLE: 2 * 2048**3 / best(lambda: wide @ wide)}
    with rounded():
        found[ROUNDED] = product / best(lambda: linear(a, b))
    target = torch.empty(1 << 26)
    source = torch.ones(1 << 26)
    found["memory"] = 2 * 4 * (1 << 26) / best(lambda: target.copy_(source))
    return found


def disk_rate(folder: Path) -> float:
    """Bytes a second at which activations are written and read, through the same code."""
    stream = Activations(folder / "rate.f32", (64, LENGTH, 2048))
    values = torch.randn(8, LENGTH, 2048)
    started = time.perf_counter()
    with stream.writing() as out:
        for _ in range(8):
            out.append(values)
    for start in range(0, 64, 8):
        stream.read(start, start + 8)
    stream.delete()
    return 2 * 64 * LENGTH * 2048 * 4 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=131072, help="of the calibration text")
    parser.add_argument("--share", type=float, default=1 / 8, help="of these tokens that pass through the block")
    parser.add_argument("--experts", type=int, default=16, help="that are solved; all are observed")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bf16"))
    parser.add_argument("--recipe", default="qwen-moe-2bit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compress-stages-") as scratch, torch.inference_mode():
        folder, config = Path(scratch), SHAPES[args.shape]
        model = DEMO if config is None else random_model(folder / "model", config)
        recipe = load_recipe(args.recipe, [f"calibration.samples={args.tokens // LENGTH}"], model=str(model))
        plan = make_plan(recipe)
        placement = Placement.choose().multiplying(args.precision, plan.own_codec)
        rates = {**ceilings(), "disk": disk_rate(folder)}
        windows = max(8, int(args.tokens * args.share) // LENGTH)
        stages = measure(plan, model, folder, placement, windows, args.tokens / (windows * LENGTH), args.experts)
    print(f"{args.shape}, {args.tokens:,} tokens, {torch.get_num_threads()} threads, products of {placement.products}")
    print(", ".join(f"{name} {rate / 1e9:,.0f} G/s" for name, rate in rates.items()))
    print(table(stages, rates))


def measure(
    plan: Plan, model: Path, folder: Path, placement: Placement, windows: int, text: float, experts: int
) -> dict[str, Stage]:
    """Seconds and work of every stage of the first block. text: times that the whole text is longer."""
    checkpoint = Checkpoint.open(model)
    shape = (windows, LENGTH, plan.spec.hidden_size)
    own, original = (Activations(folder / f"{name}.f32", shape) for name in ("own", "original"))
    generator = torch.Generator().manual_seed(1)
    with own.writing() as ours, original.writing() as theirs:
        for _ in range(windows):
            hidden = torch.randn(1, *shape[1:], generator=generator)
            theirs.append(hidden)
            ours.append(hidden + 0.05 * torch.randn(hidden.shape, generator=generator))
    size, kind = 4 * prod(shape), ROUNDED if placement.rounded else FLOAT32
    stages: dict[str, Stage] = {}
    (block,) = walk(plan.spec, checkpoint.load, placement, layers=[0])
    for branch in block.branches:
        half = branch.sublayer.half
        tensors = [t for t in plan.block(0) if t.spec.part == branch.part]
        job = Job(checkpoint.load, seed=0, placement=placement)
        with placement.observing():
            with watched(stages, half, kind, size, text, experts / max(1, plan.spec.experts), experts):
                result = sublayers.compress_sublayer(branch, tensors, Streams(own, original), job)
            after = [Activations(folder / f"{half}-{n}.f32", shape) for n in range(2)]
            stage = stages[f"{half}: advance"] = Stage(moved=4 * size, scale=text)
            with timed(stage, kind):
                advance(branch, result.weights, own, after[0])
                advance(branch, result.original, original, after[1])
        own, original = after
    return stages


@contextmanager
def counted(stage: Stage, kind: str) -> Iterator[None]:
    """Add the operations of what runs inside, in this thread."""
    with FlopCounterMode(display=False) as counter:
        yield
    stage.operations[kind] = stage.operations.get(kind, 0.0) + counter.get_total_flops()


@contextmanager
def timed(stage: Stage, kind: str | None = None) -> Iterator[None]:
    """Add the seconds of what runs inside, and its operations where they are of one kind."""
    started = time.perf_counter()
    with counted(stage, kind) if kind else nullcontext():
        yield
    stage.seconds += time.perf_counter() - started


@contextmanager
def watched(
    stages: dict[str, Stage], half: str, kind: str, size: int, text: float, share: float, experts: int
) -> Iterator[None]:
    """`compress_sublayer` with its passes and solves timed; experts beyond the first few get the outcomes of those."""
    collect, solve, together = sublayers.collect, sublayers._solve, sublayers.solve_together
    lock, current = Lock(), Stage()

    def passing(site: Site, number: int, group: Sequence[PlannedTensor], progress: Any = None) -> Any:
        stage = stages.setdefault(f"{half}: observe {number + 1}", Stage(scale=text))
        stage.moved += 2 * size
        with timed(stage, kind):
            return collect(site, number, group)

    def solving(
        branch: Branch, group: Sequence[PlannedTensor], moments: Any, result: Result, job: Job, progress: Any
    ) -> None:
        nonlocal current
        some = [t for t in group if t.spec.expert is None or t.spec.expert < experts]
        if some:
            roles = ", ".join(dict.fromkeys(t.spec.role.split(".")[-1] for t in some))
            scale = 1 / share if some[0].spec.expert is not None else 1.0
            current = stages.setdefault(f"{half}: solve {roles}", Stage(scale=max(1.0, scale)))
            with timed(current):
                solve(branch, some, moments, result, job, progress)
        first = {(t.role, t.expert): t.name for t in branch.tensors}
        for other in (t for t in group if t.name not in result.packed):
            twin = first[other.spec.role, (other.spec.expert or 0) % experts]
            for found in (result.packed, result.outcomes, result.weights):
                found[other.name] = found[twin]  # type: ignore[index]

    def several(problems: Sequence[Sequence[Task]], seed: int = 0) -> Any:
        own = Stage()
        with counted(own, FLOAT32):
            outcomes = together(problems, seed)
        factors = sum(4 / 3 * members[0].weight.shape[1] ** 3 for members in problems)
        with lock:
            for name, count in ((FLOAT32, own.operations[FLOAT32]), (DOUBLE, factors)):
                current.operations[name] = current.operations.get(name, 0.0) + count
        return outcomes

    sublayers.collect, sublayers._solve, sublayers.solve_together = passing, solving, several
    try:
        yield
    finally:
        sublayers.collect, sublayers._solve, sublayers.solve_together = collect, solve, together


def table(stages: dict[str, Stage], rates: dict[str, float]) -> str:
    lines = ["", "| stage | TFLOP | GB | floor | measured | ratio |", "|---|---|---|---|---|---|"]
    sums = [0.0, 0.0]
    for name, stage in stages.items():
        work = sum(operations / rates[kind] for kind, operations in stage.operations.items())
        floor = stage.scale * max(work, stage.moved / rates["disk"])
        seconds = stage.scale * stage.seconds
        sums = [sums[0] + floor, sums[1] + seconds]
        done = stage.scale * sum(stage.operations.values()) / 1e12
        lines.append(
            f"| {name} | {done:,.2f} | {stage.scale * stage.moved / 1e9:,.1f} | {floor:,.1f} s | {seconds:,.1f} s | {seconds / floor:.1f} |"
        )
    lines.append(f"| all | | | {sums[0]:,.0f} s | {sums[1]:,.0f} s | {sums[1] / sums[0]:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
