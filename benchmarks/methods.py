"""Every method on one model: bits per weight, KL divergence, perplexity, top-1 agreement, wall time.

    python benchmarks/methods.py --samples 256 --windows 60 --markdown out.md [--only PATTERN]
    python benchmarks/methods.py --model smollm2-135m --samples 64 --windows 60 --markdown out.md

Each case is one `compress run` of a shipped recipe, or of one with a few overrides, in a process of its own; all read the
same calibration windows and are scored on the same windows of WikiText-2, on which no setting was chosen.

smollm2-135m comes as a Q4_1 file, so that its weights lie on a grid of 4 bits in blocks of 32, which would flatter formats with
that grid: the original here is the decoded model with seeded uniform noise of half a step (`compress.models.gguf.dither`).
Its rows of 576 divide into groups of 64 and 32, not of 128 or 256: K-quants fall back as llama-quantize's do, which the table
says.
"""

from __future__ import annotations

import re

from _cases import TOY, Case, Row, arguments, measure, original, scratch_suite


def experts(codec: str, solver: str = "gptq") -> tuple[str, ...]:
    """quip-2bit or trellis-2bit with another codec for the experts; everything around them stays the same."""
    return (f"steps[0].quantize.rules[0].codec={codec}", f"steps[0].quantize.solver={solver}")


LATTICE, TRELLIS = "{name: gptq, sweeps: 4}", "{name: gptq, sweeps: 1}"  # as their recipes have it


TWO, THREE, FOUR, EIGHT = "2 bits, routed experts", "3 bits, routed experts", "4 bits", "8 bits"
FILES = "GGUF files, scored in llama.cpp"
ADVICE = "what `compress advise` proposes"


def mix(name: str) -> Case:
    """A scheme as the recipe of the everyday 4-bit file has it."""
    return Case(ADVICE, name, "gguf-q4-k-m", (f"steps[0].quantize.scheme={name}",))


MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "IQ2_M", "EXPERTS_4BIT", "EXPERTS_3BIT")
RECIPES = (
    "gguf-q4-k-m", "qwen-moe-2bit-plus", "moe-2bit", "reap-25-2bit", "gguf-iq1-m", "gptq-w4-g128",
)  # fmt: skip
ADVISED = (*map(mix, MIXES), *(Case(ADVICE, name, name) for name in RECIPES))
"""The table that `compress/advise/quality.yaml` is a copy of: --only '^what '."""
CASES = (
    Case(TWO, "int2-g128-asym rtn", "quip-2bit", experts("int2-g128-asym", "rtn")),
    Case(TWO, "int2-g128-asym gptq", "quip-2bit", experts("int2-g128-asym")),
    Case(TWO, "q2_k rtn", "quip-2bit", experts("q2_k", "rtn")),
    Case(TWO, "q2_k gptq", "quip-2bit", experts("q2_k")),
    Case(TWO, "iq2_xxs rtn", "quip-2bit", experts("iq2_xxs", "rtn")),
    Case(TWO, "iq2_xxs gptq", "quip-2bit", experts("iq2_xxs")),
    Case(TWO, "iq2_s gptq", "quip-2bit", experts("iq2_s")),
    Case(TWO, "e8p rtn", "quip-2bit", experts("e8p", "rtn")),
    Case(TWO, "e8p gptq (quip-2bit)", "quip-2bit"),
    Case(TWO, "trellis2 rtn", "quip-2bit", experts("trellis2", "rtn")),
    Case(TWO, "trellis2 gptq (trellis-2bit)", "trellis-2bit"),
    Case(TWO, "iq1_m gptq", "quip-2bit", experts("iq1_m")),
    Case(TWO, "iq1_s gptq", "quip-2bit", experts("iq1_s")),
    Case(TWO, "tq2_0 gptq", "quip-2bit", experts("tq2_0")),
    Case(TWO, "tq1_0 gptq", "quip-2bit", experts("tq1_0")),
    Case(THREE, "int3-g128 gptq", "quip-2bit", experts("int3-g128")),
    Case(THREE, "iq3_xxs gptq", "quip-2bit", experts("iq3_xxs")),
    Case(THREE, "iq3_s gptq", "quip-2bit", experts("iq3_s")),
    Case(THREE, "q3_k gptq", "quip-2bit", experts("q3_k")),
    Case(THREE, "e8p3 gptq", "quip-2bit", experts("e8p3", LATTICE)),
    Case(THREE, "trellis3 gptq", "quip-2bit", experts("trellis3", TRELLIS)),
    Case(FOUR, "rtn-w4-g128", "rtn-w4-g128"),
    Case(FOUR, "gptq-w4-g128", "gptq-w4-g128"),
    Case(FOUR, "rtn, asymmetric", "rtn-w4-g128", ("steps[0].quantize.scheme=W4A16_ASYM",)),
    Case(FOUR, "gptq, asymmetric", "gptq-w4-g128", ("steps[0].quantize.scheme=W4A16_ASYM",)),
    Case(FOUR, "awq-w4-g128", "awq-w4-g128"),
    Case(FOUR, "awq-gptq-w4-g128", "awq-gptq-w4-g128"),
    Case(FOUR, "rotate-w4-g128", "rotate-w4-g128"),
    Case(FOUR, "nf4", "nf4"),
    Case(FOUR, "nf4-solved", "nf4-solved"),
    Case(FOUR, "fp4-dq gptq", "nf4-solved", ("steps[0].quantize.rules[0].codec=fp4-dq",)),
    Case(FOUR, "e8p4 gptq, experts", "quip-2bit", experts("e8p4", LATTICE)),
    Case(FOUR, "trellis4 gptq, experts", "quip-2bit", experts("trellis4", TRELLIS)),
    Case(FOUR, "iq4_xs gptq, experts", "quip-2bit", experts("iq4_xs")),
    Case(EIGHT, "int8-w8a16", "int8-w8a16"),
    Case(EIGHT, "int8-w8a8", "int8-w8a8"),
    Case(EIGHT, "int8-w8a8 without smoothing", "int8-w8a8", ("steps=[{quantize: {solver: gptq, scheme: W8A8}}]",)),
    Case(FILES, "gguf-q4-k-m", "gguf-q4-k-m"),
    Case(FILES, "awq-gguf-q4-k-m", "awq-gguf-q4-k-m"),
    Case(FILES, "gguf-mxfp4", "gguf-mxfp4"),
    Case(FILES, "qwen-moe-2bit-plus", "qwen-moe-2bit-plus"),
    Case(FILES, "qwen-moe-2bit", "qwen-moe-2bit"),
    Case(FILES, "moe-2bit", "moe-2bit"),
    Case(FILES, "gguf-iq1-m", "gguf-iq1-m"),
    Case(FILES, "gguf-ternary", "gguf-ternary"),
)  # fmt: skip


def groups(codec: str, solver: str = "gptq") -> tuple[str, ...]:
    """A recipe of ours with all linears at one codec."""
    rule = f"{{targets: [attention, mlp], codec: {codec}}}"
    return (f"steps=[{{quantize: {{solver: {solver}, rules: [{rule}]}}}}]",)


def scheme(name: str, solver: str = "gptq", before: str = "") -> tuple[str, ...]:
    """The same with a named scheme; before: steps in front."""
    return (f"steps=[{before}{{quantize: {{solver: {solver}, scheme: {name}}}}}]",)


TWO_MLP, THREE_MLP = "2 bits, feed-forward", "3 bits, feed-forward"
AWQ, ROTATE = "{awq: {grid: 20}}, ", "{rotate: {kinds: [R1, R2]}}, "
DENSE = (
    Case(TWO_MLP, "int2-g64-asym rtn", "quip-2bit", experts("int2-g64-asym", "rtn")),
    Case(TWO_MLP, "int2-g64-asym gptq", "quip-2bit", experts("int2-g64-asym")),
    Case(TWO_MLP, "e8p rtn", "quip-2bit", experts("e8p", "rtn")),
    Case(TWO_MLP, "e8p gptq (quip-2bit)", "quip-2bit"),
    Case(THREE_MLP, "int3-g64 rtn", "quip-2bit", experts("int3-g64", "rtn")),
    Case(THREE_MLP, "int3-g64 gptq", "quip-2bit", experts("int3-g64")),
    Case(THREE_MLP, "e8p3 gptq", "quip-2bit", experts("e8p3", LATTICE)),
    Case(FOUR, "rtn, groups of 64", "rtn-w4-g128", scheme("W4A16G64", "rtn")),
    Case(FOUR, "gptq, groups of 64", "gptq-w4-g128", scheme("W4A16G64")),
    Case(FOUR, "rtn, asymmetric", "rtn-w4-g128", scheme("W4A16G64_ASYM", "rtn")),
    Case(FOUR, "gptq, asymmetric", "gptq-w4-g128", scheme("W4A16G64_ASYM")),
    Case(FOUR, "awq, asymmetric", "awq-w4-g128", scheme("W4A16G64_ASYM", "rtn", AWQ)),
    Case(FOUR, "awq, then gptq, asymmetric", "awq-gptq-w4-g128", scheme("W4A16G64_ASYM", "gptq", AWQ)),
    Case(FOUR, "rotated, gptq, groups of 64", "rotate-w4-g128", scheme("W4A16G64", "gptq", ROTATE)),
    Case(FOUR, "nf4", "nf4"),
    Case(FOUR, "nf4-solved", "nf4-solved"),
    Case(FOUR, "iq4_nl rtn", "quip-2bit", groups("iq4_nl", "rtn")),
    Case(FOUR, "iq4_nl gptq", "quip-2bit", groups("iq4_nl")),
    Case(FOUR, "e8p4 gptq, feed-forward", "quip-2bit", experts("e8p4", LATTICE)),
    Case(EIGHT, "int8-w8a16", "int8-w8a16", groups("int8-g64")),
    Case(EIGHT, "int8-w8a8", "int8-w8a8"),  # without smoothing the gate refuses it
    Case(FILES, "Q4_0", "gguf-q4-k-m", ("steps[0].quantize.scheme=Q4_0",)),
    Case(FILES, "IQ4_NL", "gguf-q4-k-m", ("steps[0].quantize.scheme=IQ4_NL",)),
    Case(FILES, "gguf-q4-k-m", "gguf-q4-k-m"),
    Case(FILES, "awq-gguf-q4-k-m", "awq-gguf-q4-k-m"),
    Case(FILES, "Q6_K", "gguf-q4-k-m", ("steps[0].quantize.scheme=Q6_K",)),
    Case(FILES, "Q8_0", "gguf-q4-k-m", ("steps[0].quantize.scheme=Q8_0",)),
)  # fmt: skip
"""For models without experts, whose rows of 576 no 128 and no 256 divides."""


def table(rows: list[Row]) -> str:
    """Markdown, one block a group, the closest model last, then what stands in for what."""
    lines = []
    for group in dict.fromkeys(row.case.group for row in rows):
        lines += [
            "",
            f"| {group} | bits, experts or feed-forward | bits, file | KL | 95% interval | perplexity | against original | top-1 | time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        members = [row for row in rows if row.case.group == group]
        for row in sorted(members, key=lambda row: -row.kl[0]):
            mean, low, high = row.kl
            lines.append(
                f"| {row.case.label} | {row.expert_bits:.2f} | {row.bits:.2f} | {mean:.5f} | {low:.5f} to {high:.5f} "
                f"| {row.perplexity:.2f} | {100 * (row.ratio - 1):+.2f}% | {100 * row.top1:.1f}% | {row.seconds:.0f} s |"
            )
    if fallen := [f"- {row.case.label}: {row.fallbacks}" for row in rows if row.fallbacks]:
        lines += ["", "Rows that do not divide into a codec's blocks:", "", *fallen]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows: list[Row] = []
    with scratch_suite(options.text, options.windows) as (scratch, suite):
        model = original(options.model, scratch)
        for case in (*CASES, *ADVISED) if options.model == TOY else DENSE:
            if not re.search(options.only, f"{case.group}: {case.label}"):
                continue
            rows.append(measure(case, options.samples, suite, scratch, model))
            print(f"{case.label}: KL {rows[-1].kl[0]:.5f}, {rows[-1].seconds:.0f} s", flush=True)
            if options.markdown:
                options.markdown.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
