"""Our GGUF against llama.cpp's own quantizer: same types tensor by tensor, same bytes, same calibration tokens.

    python benchmarks/gguf_vs_llama_quantize.py --samples 512 --windows 100 --markdown out.md
    python benchmarks/gguf_vs_llama_quantize.py --model smollm2-135m --samples 64 --windows 60 --markdown out.md

llama-quantize gets an imatrix of the very windows that our solvers see (mean squared input of every column, per
expert, as llama-imatrix computes it). Both files and the float32 reference run in llama.cpp. The ratio of mean KL
    float32 = StreamedSource(plan.spec, checkpoint.load, "original")
    (_, their_windows), (_, our_windows) = score_many(float32, [a, b], windows)
    ratio = paired_ratio(our_windows.kld, their_windows.kld, our_windows.documents)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _cases import TOY, fallen_back, original

from compress.containers import gguf
from compress.containers.base import WriteRequest
from compress.engines.ggml import quantize
from compress.engines.llama_cpp import LlamaCpp
from compress.engines.streamed import StreamedSource
from compress.models.checkpoint import Checkpoint
from compress.models.forward import Taps
from compress.models.spec import ModelSpec
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe
from compress.report.progress import Reporter
from compress.run import compress_model, load_calibration
from compress.scoring.divergence import paired_ratio, score_many
from compress.streaming.journal import Journal
from compress.streaming.walk import walk
from compress.text import EvalWindows, eval_windows, load_tokenizer
from compress.weights import Packed

TYPES = (
    "q8_0", "q6_k", "q5_k", "q4_1", "q4_k", "mxfp4", "iq4_xs", "iq4_nl", "q4_0", "iq3_s", "q3_k", "iq3_xxs", "q2_k", "iq2_s",
    "iq2_xs", "iq2_xxs", "tq2_0", "iq1_m", "tq1_0", "iq1_s",
)  # fmt: skip


def experts_at(codec: str) -> list[str]:
    """Overrides that put all routed experts at `codec` and the rest of the 2-bit recipe as it is."""
    return [f"steps[0].quantize.rules[0].codec={codec}", f"steps[0].quantize.rules[1].codec={codec}"]


HEADLINES = ("qwen-moe-2bit", "moe-2bit", "Q4_K_M", "Q4_0")
CASES: dict[str, tuple[str, list[str]]] = {
    "qwen-moe-2bit": ("qwen-moe-2bit", []),
    "moe-2bit": ("moe-2bit", []),
    "Q4_K_M": ("gguf-q4-k-m", []),
    **{f"experts {t}": ("qwen-moe-2bit", experts_at(t)) for t in TYPES},
}


MIXES = ("Q4_K_M", "Q4_0", "IQ4_NL", "Q5_K_M", "Q6_K", "Q8_0")
DENSE: dict[str, tuple[str, list[str]]] = {mix: ("gguf-q4-k-m", [f"steps[0].quantize.scheme={mix}"]) for mix in MIXES}
"""For models without experts."""


def imatrix(checkpoint: Checkpoint, spec: ModelSpec, ids: np.ndarray, batch: int = 8) -> dict[str, np.ndarray]:
    """Mean squared input of every column on the original model: gguf name -> [cols] or [experts, cols]."""
    sums: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}

    def observer(layer: int):
        def see(key: str, x: torch.Tensor, gate: torch.Tensor | None) -> None:
            total, count = sums.get((layer, key), (0.0, 0))
            sums[layer, key] = (total + x.double().square().sum(0), count + len(x))

        return see

    table = checkpoint.load(spec.embeddings).float()
    hidden = [
        table[torch.from_numpy(np.ascontiguousarray(ids[i : i + batch])).long()] for i in range(0, len(ids), batch)
    ]
    for block in walk(spec, checkpoint.load):
        hidden = [block.forward(states, Taps(observer(block.layer))) for states in hidden]
    out: dict[str, list[np.ndarray]] = {}
    for tensor in spec.tensors():
        if tensor.input is None or tensor.layer is None or tensor.role == "router":
            continue
        total, count = sums.get((tensor.layer, tensor.input), (torch.ones(tensor.shape[-1]), 1))
        out.setdefault(tensor.gguf, []).append((total / count).float().numpy())
    return {name: np.stack(rows) if len(rows) > 1 else rows[0] for name, rows in out.items()}


def ours(plan: Plan, checkpoint: Checkpoint, folder: Path) -> tuple[Path, float]:
    """Our file, and the seconds it took without scoring."""
    started = time.monotonic()
    journal = Journal.open(folder / "work", plan.digest, fresh=True)
    with torch.inference_mode():
        compress_model(plan, checkpoint, journal, Reporter(0))
    files = gguf.write(WriteRequest(folder / "ours.gguf", plan.spec, plan.tensors, journal.fetch, source=plan.source))
    return files[0], time.monotonic() - started


def reference(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Path:
    """The original in float32."""
    plain = make_plan(load_recipe("qwen-moe-2bit", ["steps=[]"], model=plan.recipe.model), weights=True)
    tensors = [type(t)(t.spec, "f32", None, 0) for t in plain.tensors]

    def fetch(name: str) -> Packed:
        values = checkpoint.load(name).float()
        return Packed("f32", tuple(values.shape), {"values": values})

    return gguf.write(WriteRequest(folder / "original.gguf", plan.spec, tensors, fetch, source=plan.source))[0]


def exact(plan: Plan, checkpoint: Checkpoint, theirs: Path, mine: Path, windows: EvalWindows) -> str:
    """The ratio of KL divergences when both files' decoded weights are run in float32, without an engine's rounding."""
    a, b = (StreamedSource(plan.spec, gguf.open_dense(path, plan.spec), path.stem) for path in (theirs, mine))
    float32 = StreamedSource(plan.spec, checkpoint.load, "original")
    (_, their_windows), (_, our_windows) = score_many(float32, [a, b], windows)
    ratio = paired_ratio(our_windows.kld, their_windows.kld, our_windows.documents)
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TOY, help="a folder, or smollm2-135m: a real model of 135M, dithered")
    parser.add_argument("--samples", type=int, default=512, help="calibration windows of 512 tokens")
    parser.add_argument("--text", default="wikitext2", help="bundled evaluation set to score on")
    parser.add_argument("--windows", type=int, default=100, help="scored windows of 512 tokens")
    parser.add_argument(
        "--cases", nargs="*", help=f"a subset of: {', '.join(CASES)}; of others than the toy: {', '.join(DENSE)}"
    )
    parser.add_argument("--set", nargs="*", default=[], help="more recipe overrides for our side")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    cases = CASES if args.model == TOY else DENSE
    lines = [
        "| types | bytes | llama.cpp KL | ours KL | ratio | 95% interval | top-1 llama.cpp | ours | solve s | ratio in float32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    fallen: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        importance, source = None, None
        model = original(args.model, folder)
        for case in args.cases or cases:
            recipe, overrides = cases[case]
            overrides = [*overrides, f"calibration.samples={args.samples}", *args.set]
            plan = make_plan(load_recipe(recipe, overrides, model=model), weights=True)
            checkpoint = Checkpoint.open(plan.source)
            if importance is None:
                windows = eval_windows(args.text, load_tokenizer(plan.source), windows=args.windows, length=512)
                importance = imatrix(checkpoint, plan.spec, load_calibration(plan))
                source = reference(plan, checkpoint, folder)
            mine, seconds = ours(plan, checkpoint, folder)
            theirs = folder / "theirs.gguf"
            types = {name: codec for name, (codec, shape) in gguf.inventory(mine).items() if len(shape) > 1}
            quantize(source, theirs, "Q8_0", imatrix=importance, tensor_types=types)
            assert {n: c for n, (c, _) in gguf.inventory(theirs).items()} == {
                n: c for n, (c, _) in gguf.inventory(mine).items()
            }
            with LlamaCpp(source) as base, LlamaCpp(theirs) as a, LlamaCpp(mine) as b:
                (their_scores, their_windows), (our_scores, our_windows) = score_many(base, [a, b], windows)
            ratio = paired_ratio(our_windows.kld, their_windows.kld, our_windows.documents)
            cells = [case, f"{plan.bytes:,}", f"{their_scores.kld.mean:.5f}", f"{our_scores.kld.mean:.5f}"]
            cells += [f"**{ratio.value:.3f}**", f"{ratio.low:.3f} to {ratio.high:.3f}"]
            cells += [f"{s.top1_agreement.value:.1%}" for s in (their_scores, our_scores)]
            cells += [f"{seconds:.0f}", exact(plan, checkpoint, theirs, mine, windows) if case in HEADLINES else ""]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            if change := fallen_back(plan.as_dict()["tensors"]):
                fallen.append(f"- {case}: {change}")
                print(fallen[-1], flush=True)
            if args.markdown:
                args.markdown.write_text("\n".join([*lines, "", *fallen]).strip() + "\n")


if __name__ == "__main__":
    main()
