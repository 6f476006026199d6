"""Pruning, factorisation and structure at matched bytes: KL divergence, perplexity, decode speed, against plain quantization.

    python benchmarks/shrinking.py --samples 128 --windows 60 --markdown out.md [--only PATTERN]

Each case is one `compress run` in a process of its own; all read the same calibration windows and are scored on the same
windows of WikiText-2, on which no setting was chosen. Within a block of the table the bytes are (nearly) the same. Decode
speed: one token through the whole loaded model, as a multiple of the time of the original, both in one process and in
turns, in bfloat16; GGUF files in llama.cpp against the original as a bfloat16 GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from _cases import ROOT, Case, Row, arguments, measure, median_ratio, scratch_suite

ORIGINAL = ROOT / "models" / "tiny-qwen3-moe"
HALF, TWO_FOUR, FOUR_EIGHT = "50 % of the weights, 16-bit values", "2:4, 16-bit values", "4:8, 16-bit values"
CODES = "3.125 bits a weight (experts and attention)"
FACTORS = {ratio: f"factors, {ratio} % smaller, masks counted" for ratio in (20, 30, 40)}
STRUCTURE, EXPERTS_2, EXPERTS_SMALL = (
    "about a quarter smaller, stock models",
    "experts at about 2.3 bits",
    "experts below 1.8 bits",
)
PLAIN = "plain quantization, for scale"


def quantized(codec: str, more: str = "") -> str:
    """All linears but the head in one codec."""
    rule = f"{{targets: [attention, routed_experts], codec: {codec}}}"
    return f"steps=[{more}{{quantize: {{solver: gptq, rules: [{rule}]}}}}]"


def experts(gate_up: str, down: str, more: str = "") -> str:
    """Routed experts in two codecs, what every token passes in q8_0: the layout of EXPERTS_2BIT."""
    rules = (
        f"{{targets: [routed_experts.gate, routed_experts.up], codec: {gate_up}}}, {{targets: routed_experts.down, codec: {down}}}, "
        "{targets: [attention, embeddings], codec: q8_0}, {targets: router, codec: f32}"
    )
    return f"steps=[{more}{{quantize: {{solver: gptq, rules: [{rules}]}}}}]"


def sparse(group: str, sparsity: str) -> tuple[Case, ...]:
    return tuple(
        Case(group, solver, "wanda-50", (f"steps=[{{prune: {{solver: {solver}, sparsity: '{sparsity}'}}}}]",))
        if ":" in sparsity
        else Case(group, solver, "wanda-50", (f"steps=[{{prune: {{solver: {solver}, sparsity: {sparsity}}}}}]",))
        for solver in ("magnitude", "wanda", "sparsegpt")
    )


def factors(ratio: int) -> tuple[Case, ...]:
    def case(label: str, options: str) -> Case:
        return Case(
            FACTORS[ratio], label, "compot-20", (f"steps=[{{factorize: {{ratio: {ratio / 100}, {options}}}}}]",)
        )

    cases = (
        case("svd (SVD-LLM)", "solver: svd"),
        case("compot as published", "solver: {name: compot, rounds: 0, drift: 0, residual: 0}"),
        case("compot", "solver: compot"),
        case("rocket", "solver: rocket, allocation: knapsack"),
    )
    return (
        cases
        if ratio != 20
        else (
            *cases,
            case("svd, our targets, knapsack", "solver: {name: svd, drift: 1, residual: 1}, allocation: knapsack"),
            case("compot, knapsack", "solver: compot, allocation: knapsack"),
        )
    )


PUBLISHED = "steps[0].prune.solver={name: sparsegpt, sweeps: 0, drift: 0, residual: 0}"
KEEP = "export=[{container: safetensors}]"
REAP = "{prune_experts: {ratio: 0.25}}, "
CASES = (
    *sparse(HALF, "0.5"),
    Case(HALF, "sparsegpt as published", "sparsegpt-50", (PUBLISHED,)),
    Case(HALF, "sparsegpt, more where layers have fewer outliers", "sparsegpt-50", ("steps[0].prune.allocation=outliers",)),
    *sparse(TWO_FOUR, "2:4"),
    *sparse(FOUR_EIGHT, "4:8"),
    Case(CODES, "wanda 50 %, then int4-g128", "sparsegpt-50-int4", ("steps[0].prune.solver=wanda", "steps[0].prune.joint=false")),
    Case(CODES, "sparsegpt as published, then int4-g128", "sparsegpt-50-int4", (PUBLISHED, "steps[0].prune.joint=false")),
    Case(CODES, "sparsegpt 50 %, then int4-g128", "sparsegpt-50-int4", ("steps[0].prune.joint=false",)),
    Case(CODES, "sparsegpt 50 % with int4-g128", "sparsegpt-50-int4"),
    Case(CODES, "int3-g128, nothing pruned", "sparsegpt-50-int4", (quantized("int3-g128"),)),
    *factors(20), *factors(30), *factors(40),
    Case(STRUCTURE, "structured-25", "structured-25", (KEEP,)),
    Case(STRUCTURE, "structured-25 without repair", "structured-25", (KEEP, "steps[0].prune_structured.repair=false")),
    Case(STRUCTURE, "drop-layers (1 of 4)", "drop-layers", (KEEP,)),
    Case(STRUCTURE, "drop-layers without repair", "drop-layers", (KEEP, "steps[0].drop_layers.repair=false")),
    Case(STRUCTURE, "reap-25", "reap-25", (KEEP,)),
    Case(STRUCTURE, "reap-25 without repair (as published)", "reap-25", (KEEP, "steps[0].prune_experts.repair=false")),
    Case(STRUCTURE, "merged experts", "reap-25", (KEEP, "steps[0].prune_experts.method=merge")),
    Case(STRUCTURE, "compot-20", "compot-20"),
    Case(EXPERTS_2, "EXPERTS_2BIT, all experts", "reap-25-2bit", (experts("iq2_xxs", "q2_k"),)),
    Case(EXPERTS_2, "reap-25 at 3 bits", "reap-25-2bit", (experts("iq3_xxs", "iq3_xxs", REAP),)),
    Case(EXPERTS_SMALL, "all experts at 1.56 and 2.06 bits", "reap-25-2bit", (experts("iq1_s", "iq2_xxs"),)),
    Case(EXPERTS_SMALL, "reap-25-2bit", "reap-25-2bit"),
    Case(PLAIN, "int8-row", "sparsegpt-50", (quantized("int8-row"),)),
    Case(PLAIN, "int4-g128", "sparsegpt-50", (quantized("int4-g128"),)),
    Case(PLAIN, "compot-20-int4", "compot-20-int4"),
)  # fmt: skip


def decode_ratio(artifact: Path, dense: Callable[[], Path]) -> float:
    """Time of one token behind a short prompt, artifact over original."""
    if artifact.suffix == ".gguf":
        from compress.engines.llama_cpp import LlamaCpp

        with LlamaCpp(artifact) as one, LlamaCpp(dense()) as other:
            return median_ratio(
                *(lambda model=model: model.generate("The city of London", 16) for model in (one, other))
            )
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    import compress  # noqa: F401  (registers its container)

    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).eval() for f in (artifact, ORIGINAL)]
    token = torch.tensor([[17]])
    with torch.inference_mode():
        return median_ratio(*(lambda model=model: model(token, use_cache=False) for model in models))


def weights(artifact: Path) -> int:
    """Bytes of its weight files."""
    return sum(f.stat().st_size for f in ([artifact] if artifact.is_file() else artifact.glob("*.safetensors")))


def table(rows: list[tuple[Row, float]], whole: int) -> str:
    """Markdown, one block a group, the closest model last."""
    lines = []
    for group in dict.fromkeys(row.case.group for row, _ in rows):
        lines += [
            "",
            f"| {group} | bytes | of original | KL | 95% interval | perplexity | top-1 | one token | time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row, speed in sorted((r for r in rows if r[0].case.group == group), key=lambda r: -r[0].kl[0]):
            mean, low, high = row.kl
            lines.append(
                f"| {row.case.label} | {weights(row.folder):,} | {weights(row.folder) / whole:.1%} | {mean:.5f} | {low:.5f} to {high:.5f} "
                f"| {100 * (row.ratio - 1):+.2f}% | {100 * row.top1:.1f}% | {speed:.2f}x | {row.seconds:.0f} s |"
            )
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows: list[tuple[Row, float]] = []
    whole = weights(ORIGINAL)
    with scratch_suite(options.text, options.windows) as (scratch, suite):

        def dense() -> Path:
            path = scratch / "original.gguf"
            if not path.exists():
                plain = Case("", "original", "reap-25", ("steps=[]", "export=[{container: gguf, name: original}]"))
                measure(plain, options.samples, suite, scratch).folder.rename(path)
            return path

        for case in CASES:
            if not re.search(options.only, f"{case.group}: {case.label}"):
                continue
            row = measure(case, options.samples, suite, scratch)
            rows.append((row, decode_ratio(row.folder, dense)))
            print(
                f"{case.group}: {case.label}: {weights(row.folder):,} bytes, KL {row.kl[0]:.5f}, {rows[-1][1]:.2f}x",
                flush=True,
            )
            if options.markdown:
                options.markdown.write_text(table(rows, whole))
        print(table(rows, whole))


if __name__ == "__main__":
    main()
