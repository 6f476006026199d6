"""Peak memory of a run against the number of blocks: must be flat.

    python benchmarks/memory_by_depth.py [--blocks 2 8 32]

Random Qwen3-MoE models of one width, each compressed in a process of its own with score: false.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import sys
from compress.recipe import load_recipe
from compress.run import run
from compress.report.progress import Reporter, peak_memory_bytes
recipe = load_recipe("qwen-moe-2bit", ["calibration.samples=32", "score=false"], model=sys.argv[1], output=sys.argv[2])
run(recipe, reporter=Reporter(0))
print(peak_memory_bytes())
"""


def make_model(folder: Path, source: Path, blocks: int) -> Path:
    """A random model like the demo's, with so many blocks and experts four times as wide."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers, config.moe_intermediate_size = blocks, 1024
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs="*", type=int, default=[2, 8, 32])
    args = parser.parse_args()
    from compress.text import data_root

    print("| blocks | checkpoint bytes | peak memory of the run | planned |\n|---|---|---|---|")
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = make_model(folder / "model", data_root("models") / "tiny-qwen3-moe", blocks)
            size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            child = subprocess.run(
                [sys.executable, "-c", CHILD, str(model), str(folder / "out")],
                check=True,
                capture_output=True,
                text=True,
            )
            planned = json.loads(
                subprocess.run(
                    [
                        sys.executable,
                        "-m",
                        "compress.cli",
                        "plan",
                        "qwen-moe-2bit",
                        "--json",
                        "--model",
                        str(model),
                        "--set",
                        "calibration.samples=32",
                        "--set",
                        "score=false",
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )["peak_memory_bytes"]
            print(
                f"| {blocks} | {size:,} | {int(child.stdout.split()[-1]) / 2**20:,.0f} MiB | {planned / 2**20:,.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
