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

from compress.codecs import block_codec, get_codec
from compress.codecs.factors import join
from compress.codecs.names import codec_info
from compress.containers.compress import Setting, stored_parts
from compress.plan.factors import factor_sizes
from compress.runtime.factored import FactoredLinear
from compress.runtime.linear import PackedLinear
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.transforms.incoherence import Incoherence, pack_signs
from compress.weights import Packed

DEFAULT = ("e8p", "trellis2", "nf4", "int4-g128", "q4_k", "sparse-bf16", "2:4-bf16", "sparse-int4-g128",
           "factors(bf16,sparse-bf16)")  # fmt: skip
CODED_ROWS = 32
FACTOR_SHARE = 0.8  # of the 16-bit bytes, masks counted


def masked(codec: str, inner: Packed) -> Packed:
    """Random values of [rows, n] under a random mask of the codec."""
    info, (rows, n) = codec_info(codec), inner.shape
    groups = torch.rand(rows, n // (info.of or n), info.of or n, generator=torch.Generator().manual_seed(1))
    mask = groups.argsort(2).argsort(2) < (info.keep or n // 2)
    return get_codec(codec).pack(inner, mask.reshape(rows, n))


def shrunk_linear(codec: str, size: int) -> nn.Module:
    """A square layer with half of its weights pruned, or a fifth smaller as a dictionary with two atoms a coefficient."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    if codec_info(codec).kind == "factors":
        sizes = factor_sizes(size, size, FACTOR_SHARE, 2.0, True)
        assert sizes is not None
        atoms, kept = sizes
        mask = torch.rand(size, atoms).argsort(1).argsort(1) < kept
        coefficients = get_codec("sparse-bf16").pack(get_codec("bf16").encode(weight[:, :atoms]), mask)
        packed = join(codec, (size, size), get_codec("bf16").encode(weight[:atoms]).parts, coefficients.parts)
        return FactoredLinear(Setting(codec), (size, size), packed.parts)
    values = codec_info(codec).parts[0]
    if codec_info(values).kind == "float":
        inner = get_codec(values).encode(weight)
    else:
        few = rtn.solve(weight[:CODED_ROWS], None, block_codec(values, size), RtnOptions()).pack()
        tall = {name: part.repeat(size // CODED_ROWS, 1) for name, part in few.parts.items()}
        inner = Packed(values, (size, size), tall)
    return PackedLinear(Setting(codec), (size, size), masked(codec, inner).parts)


def packed_linear(codec: str, size: int) -> nn.Module:
    """A square layer of `codec` with bytes as a solver would write them."""
    if codec_info(codec).derived:
        return shrunk_linear(codec, size)
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
    parser.add_argument("--codecs", nargs="*", default=DEFAULT)
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
    for name, layer in layers.items():
        bits = 8 * sum(t.numel() * t.element_size() for t in (*layer.buffers(), *layer.parameters())) / args.size**2
        cells = "".join(f" {1e3 * s[name]:.1f} | {s[name] / s['bf16']:.1f}x |" for s in seconds.values())
        print(f"| {name} | {bits:.2f} |{cells}")


if __name__ == "__main__":
    main()
