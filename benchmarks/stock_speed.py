"""Are models that lost layers, heads and channels, or experts, faster in stock engines in proportion to their bytes?

    python benchmarks/stock_speed.py [--hidden 1024] [--layers 6]

A random dense Llama and a random Qwen3-MoE, large enough that matrices rule, through shipped recipes with a little
calibration text; each result against its original, in turns, in transformers (float32, a prompt and one token behind nothing) and in
llama.cpp (bfloat16 files, generation). Quality means nothing here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from _cases import ROOT, median_ratio

from compress.engines.llama_cpp import LlamaCpp

DEMO = ROOT / "models" / "tiny-qwen3-moe"
PROMPT = 256


def random_model(kind: str, folder: Path, hidden: int, layers: int) -> Path:
    """A random checkpoint in bfloat16 with the demo model's tokenizer."""
    shared = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8,
              "vocab_size": 4096, "max_position_embeddings": 2048, "tie_word_embeddings": True}  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(intermediate_size=4 * hidden, **shared)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            moe_intermediate_size=hidden // 2,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            head_dim=64,
            **shared,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return folder


def compress(recipe: str, model: Path, output: Path, *sets: str) -> Path:
    arguments = ["run", recipe, "--model", str(model), "--output", str(output), "--quiet"]
    for setting in ("calibration.samples=4", "calibration.length=128", "score=false", *sets):
        arguments += ["--set", setting]
    subprocess.run([sys.executable, "-m", "compress.cli", *arguments], cwd=ROOT, check=True, capture_output=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cases = (("llama", "structured-25"), ("llama", "drop-layers"), ("qwen3_moe", "reap-25"))
    print(
        f"| recipe | model | bytes | {PROMPT} tokens, transformers | 1 token, transformers | 1 token, llama.cpp |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="compress-stock-") as scratch:
        for number, (kind, recipe) in enumerate(cases):
            model = Path(scratch) / kind
            if not model.exists():
                random_model(kind, model, args.hidden, args.layers)
            plain = compress("reap-25", model, Path(scratch) / f"plain-{number}", "steps=[]", "name=plain")
            small = compress(recipe, model, Path(scratch) / f"small-{number}", "name=small")
            folders = [small / "small-safetensors", plain / "plain-safetensors"]
            sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
            loaded = [
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                for folder in folders
            ]
            seconds = []
            with torch.inference_mode():
                for length in (PROMPT, 1):
                    ids = torch.randint(0, 4000, (1, length))
                    seconds.append(median_ratio(*(lambda m=m, ids=ids: m(ids, use_cache=False) for m in loaded)))
            with LlamaCpp(small / "small.gguf") as one, LlamaCpp(plain / "plain.gguf") as other:
                seconds.append(
                    median_ratio(*(lambda m=m: m.generate("The city of London", 24) for m in (one, other)), rounds=5)
                )
            cells = " | ".join(f"{s:.2f}x" for s in seconds)
            print(f"| {recipe} | {kind} | {sizes[0] / sizes[1]:.2f}x | {cells} |", flush=True)


if __name__ == "__main__":
    main()
