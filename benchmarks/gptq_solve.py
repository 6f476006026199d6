"""Time of one GPTQ solve against the machine's own float32 matrix-product rate.

    python benchmarks/gptq_solve.py [--sizes 2048 4096] [--codecs int4-g128 q4_k iq2_xxs]

Counted operations (multiply and add apart), m rows and n columns: damped inverse and its factor 2 n^3 (two Cholesky
factorisations and one inverse, in float64), feedback m n^2, every sweep 4 m n^2 (residual product and updates), every
refit of scales 4 m n^2. The search for scales is not counted, so the rate is a lower bound.
"""

from __future__ import annotations

import argparse
import time

import torch

from compress.codecs import block_codec
from compress.solvers import gptq, sparsegpt
from compress.solvers.options import GptqOptions, SparseGptOptions
from compress.weights import Pattern


def gemm_rate(n: int = 2048, seconds: float = 2.0) -> float:
    """float32 operations a second of torch.mm on this machine."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    started, products = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        a @ b
        products += 1
    return 2 * n**3 * products / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[2048, 4096])
    parser.add_argument("--codecs", nargs="*", default=["int4-g128", "q4_k", "iq2_xxs"])
    args = parser.parse_args()
    rate = gemm_rate()
    print(f"float32 matrix product: {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads\n")
    print("| codec | size | sweeps | seconds | GFLOP/s | of the product rate |\n|---|---|---|---|---|---|")
    for n in args.sizes:
        torch.manual_seed(0)
        weight = torch.randn(n, n) * 0.02
        inputs = torch.randn(n // 2, n) @ (torch.eye(n) + 0.3 * torch.randn(n, n) / n**0.5)
        gram = inputs.T @ inputs / len(inputs)
        for codec in args.codecs:
            for sweeps, refits in ((0, 0), (2, 2)):
                options = GptqOptions(sweeps=sweeps, refits=refits)
                started = time.monotonic()
                with torch.inference_mode():
                    gptq.solve(weight, gram, block_codec(codec, n), options)
                seconds = time.monotonic() - started
                operations = 2 * n**3 + n**3 + 4 * n**3 * (sweeps + sweeps + refits)
                print(
                    f"| {codec} | {n} x {n} | {sweeps} | {seconds:.1f} | {operations / seconds / 1e9:.0f} "
                    f"| {operations / seconds / rate:.0%} |",
                    flush=True,
                )
        pruning(weight, gram)


def pruning(weight: torch.Tensor, gram: torch.Tensor, rounds: int = 3) -> None:
    """SparseGPT beside GPTQ of int4-g128, both with their defaults, on one matrix, in turns."""
    codec = block_codec("int4-g128", weight.shape[1])
    calls = {
        "gptq int4-g128": lambda: gptq.solve(weight, gram, codec, GptqOptions()),
        "sparsegpt 50 %": lambda: sparsegpt.prune(weight, gram, Pattern(0.5), SparseGptOptions()),
        "sparsegpt 2:4": lambda: sparsegpt.prune(weight, gram, Pattern.n_of_m(2, 4), SparseGptOptions()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                started = time.monotonic()
                call()
                seconds[name].append(time.monotonic() - started)
    best = {name: min(times) for name, times in seconds.items()}
    for name in list(calls)[1:]:
        print(
            f"{name}, {len(weight)} x {weight.shape[1]}: {best[name]:.2f} s, {best[name] / best['gptq int4-g128']:.2f} of GPTQ's"
        )


if __name__ == "__main__":
    main()
