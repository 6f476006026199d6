"""Time of a packed linear layer against a bfloat16 nn.Linear of the same size, in one process.

    python benchmarks/decode_speed.py [--codecs e8p trellis2 nf4 int4-g128 q4_k] [--size 4096] [--tokens 1 32]

Every number is the median of interleaved calls. Activations are bfloat16; a packed layer decodes its whole weight on
every call. The codes are those of a few random rows, repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compress.codecs import block_codec
from compress.codecs.names import codec_info, stored_bytes
from compress.containers.compress import Setting, stored_parts
from compress.runtime.linear import PackedLinear
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.transforms.incoherence import Incoherence, pack_signs

CODED_ROWS = 32


def packed_linear(codec: str, size: int) -> PackedLinear:
    """A square layer of `codec` with bytes as a solver would write them."""
    weight = torch.randn(CODED_ROWS, size, generator=torch.Generator().manual_seed(0))
    parts = stored_parts(rtn.solve(weight, None, block_codec(codec, size), RtnOptions()).pack())
    tall = {name: part.repeat(size // CODED_ROWS, *[1] * (part.dim() - 1)) for name, part in parts.items()}
    if "offset" in tall:  # double quantization's one number
        tall["offset"] = parts["offset"]
    vector = codec_info(codec).kind == "vector"
    if vector:
        drawn = Incoherence.draw(size, size, 0, 1)
        tall |= {"signs_in": pack_signs(drawn.signs_in), "signs_out": pack_signs(drawn.signs_out)}
    return PackedLinear(Setting(codec, incoherence=vector), (size, size), tall)


def median_seconds(calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of each call; all take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first fills tables and caches
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="*", default=["e8p", "trellis2", "nf4", "int4-g128", "q4_k"])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    layers: dict[str, nn.Module] = {
        "bf16": nn.Linear(args.size, args.size, bias=False, dtype=torch.bfloat16),
        **{codec: packed_linear(codec, args.size) for codec in args.codecs},
    }
    print(f"{args.size} x {args.size}, bfloat16 activations, {torch.get_num_threads()} threads\n")
    heads = "".join(f" {t} token{'s' * (t > 1)}, ms | of bf16 |" for t in args.tokens)
    print(f"| weight | bits |{heads}\n|---|---|{'---|---|' * len(args.tokens)}")
    seconds = {}
    with torch.inference_mode():
        for tokens in args.tokens:
            x = torch.randn(tokens, args.size).bfloat16()
            calls = {name: (lambda layer=layer, x=x: layer(x)) for name, layer in layers.items()}
            seconds[tokens] = median_seconds(calls, args.rounds)
    for name in layers:
        bits = 8 * stored_bytes(name, (args.size, args.size)) / args.size**2
        cells = "".join(f" {1e3 * s[name]:.1f} | {s[name] / s['bf16']:.1f}x |" for s in seconds.values())
        print(f"| {name} | {bits:.2f} |{cells}")


if __name__ == "__main__":
    main()
