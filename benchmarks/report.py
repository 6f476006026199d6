"""Many variants of one model, each a `compress run`, then one page that compares them.

    python benchmarks/report.py --model tiny-qwen3-moe --html docs/demo-report.html --picture docs/demo-pareto.png

Runs that are finished are not done again and killed ones continue, so the same command goes on where it stopped. The weights of
smollm2-135m come from a file of 4-bit blocks, which flatters formats of that grid: its original here is dithered.
"""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: its label, the recipe and what differs from it."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.label).strip("-").lower()


def scheme(name: str, solver: str = "gptq") -> tuple[str, ...]:
    return (f"steps=[{{quantize: {{solver: {solver}, scheme: {name}}}}}]",)


GGUF, DENSE = "gguf-q4-k-m", "steps=[]"
BITSANDBYTES = "export=[{container: bitsandbytes}]"  # it has no place for fused experts
ONE_FILE = "export=[{container: gguf}]"
VARIANTS = {
    "tiny-qwen3-moe": (
        Variant("BF16", GGUF, (DENSE,)),
        Variant("Q8_0", GGUF, scheme("Q8_0")),
        Variant("Q4_K_M", GGUF),
        Variant("GPTQ W4 g128", "gptq-w4-g128"),
        Variant("AWQ W4 g128", "awq-w4-g128"),
        Variant("NF4", "nf4"),
        Variant("3-bit experts", "moe-2bit", (*scheme("EXPERTS_3BIT"), ONE_FILE)),
        Variant("2-bit experts, recovered", "moe-2bit", (ONE_FILE,)),
        Variant("2-bit experts", "qwen-moe-2bit"),
        Variant("2-bit experts, no error feedback", "qwen-moe-2bit", ("steps[0].quantize.solver=rtn",)),
    ),
    # 576 columns: no group of 128 and no block of 256 divides them
    "smollm2-135m": (
        Variant("BF16", GGUF, (DENSE,)),
        Variant("Q8_0", GGUF, scheme("Q8_0")),
        Variant("Q4_K_M", GGUF),
        Variant("Q4_0", GGUF, scheme("Q4_0")),
        Variant("IQ4_NL", GGUF, scheme("IQ4_NL")),
        Variant("GPTQ W4 g64", "gptq-w4-g128", scheme("W4A16_G64")),
        Variant("AWQ W4 g64", "awq-w4-g128", ("steps[1].quantize.scheme=W4A16_G64_ASYM",)),
        Variant("NF4", "nf4", (BITSANDBYTES,)),
        Variant("GPTQ W3 g64", "gptq-w4-g128", scheme("W3A16_G64")),
        Variant("GPTQ W2 g64", "gptq-w4-g128", scheme("W2A16_G64")),
    ),
}


DITHERED = ("smollm2-135m",)


def source(model: str, folder: Path) -> str:
    """The model that all variants are of; a dithered one is written once."""
    if model not in DITHERED:
        return model
    for made in folder.glob("original/*"):
        return str(made)
    from _cases import original

    (folder / "original").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        made = Path(original(model, Path(scratch)))
        return str(made.rename(folder / "original" / made.name))


def compress(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "compress.cli", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VARIANTS, default="tiny-qwen3-moe")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--speed", action="store_true", help="time each in its engine, too")
    parser.add_argument("--only", default="", help="regular expression of labels")
    parser.add_argument("--output", type=Path, help="folder of the runs, out/report/MODEL by default")
    parser.add_argument("--html", type=Path, help="write the page here")
    parser.add_argument("--picture", type=Path, help="write the plot of size and KL divergence here (.png or .svg)")
    options = parser.parse_args()
    folder = (options.output or ROOT / "out" / "report" / options.model).resolve()
    chosen = [variant for variant in VARIANTS[options.model] if re.search(options.only, variant.label)]
    model = source(options.model, folder)
    for variant in chosen:
        print(f"== {variant.label}", flush=True)
        settings = (*variant.overrides, f"calibration.samples={options.samples}", f"score.suite={options.suite}")
        settings += ("score.speed=true",) if options.speed else ()
        sets = [part for setting in settings for part in ("--set", setting)]
        output = str(folder / variant.folder)
        compress("run", variant.recipe, "--model", model, "--output", output, "--quiet", *sets)
    runs = [f"{variant.label}={folder / variant.folder}" for variant in chosen]
    files = [part for flag in ("html", "picture") if (path := getattr(options, flag))
             for part in (f"--{flag}", str(path.resolve()))]  # fmt: skip
    compress("compare", *runs, *files)


if __name__ == "__main__":
    main()
