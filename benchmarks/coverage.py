"""Do 95% intervals hold 95 times in 100? Drawn again and again from real windows, scored by a real model.

    python benchmarks/coverage.py --markdown out.md
    python benchmarks/coverage.py --model smollm2-135m --text wikitext2 --numbers smollm2.json

All windows of a text are scored once: the original, and two copies of it whose linears are rounded to nearest. Then 40 (100,
400) windows are drawn as `eval_windows` does, with another seed each time, and their interval either holds the truth
or does not. Two truths: the mean of this text's own windows, and that of the kind of text it is a sample of. For the
latter a text is first made up of as many of its documents, drawn with replacement, and the windows come from that.

Beside it, what is usually done: the first windows of a text, here any run of windows in a row, with a t interval over windows.
The more of a text is drawn, the more surely an interval made for other text holds the mean of this one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress.codecs import block_codec
from compress.engines.open import OpenedModel, open_model
from compress.engines.streamed import StreamedSource
from compress.scoring.divergence import score_many
from compress.scoring.intervals import Interval, mean_interval, paired_difference, paired_ratio
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.text import eval_windows, load_tokenizer
from compress.weights import Loader

SIZES = (40, 100, 400)
Draw = Callable[[np.random.Generator, int, int], np.ndarray]
Estimate = Callable[[np.ndarray, np.ndarray | None], Interval]


@dataclass(frozen=True)
class Numbers:
    """Window means of a model and two variants, float [N] each, and the document of every window.

    nll: of the original; nll_one, kld_one, same_one: of the first variant; kld_two: of the second."""

    documents: np.ndarray
    nll: np.ndarray
    nll_one: np.ndarray
    kld_one: np.ndarray
    same_one: np.ndarray
    kld_two: np.ndarray

    def quantities(self) -> Mapping[str, Estimate]:
        """Interval of each over the windows [n] with the documents [n] (None: every window its own)."""
        return {
            "log perplexity": lambda i, d: mean_interval(self.nll_one[i], d),
            "log perplexity ratio": lambda i, d: paired_difference(self.nll_one[i], self.nll[i], d),
            "KL divergence": lambda i, d: mean_interval(self.kld_one[i], d),
            "ratio of two KL divergences": lambda i, d: paired_ratio(self.kld_one[i], self.kld_two[i], d),
            "top-1 agreement": lambda i, d: mean_interval(self.same_one[i], d),
        }


def rounded(model: OpenedModel, codec: str) -> Loader:
    """The model with the linears of its blocks rounded to nearest."""
    linears = {
        t.name for t in model.spec.tensors() if t.input is not None and t.layer is not None and t.role != "router"
    }

    def load(name: str) -> torch.Tensor:
        weight = model.load(name)
        if name not in linears:
            return weight
        solution = rtn.solve(weight.float(), None, block_codec(codec, weight.shape[1]), RtnOptions())
        return solution.decode()

    return load


def score(name: str, text: str, codecs: list[str], length: int) -> Numbers:
    """Score all windows of a text."""
    model = open_model(name)
    windows = eval_windows(text, load_tokenizer(model.folder, model.spec.vocab_size), length=length)
    original = StreamedSource(model.spec, model.load, "original")
    variants = [StreamedSource(model.spec, rounded(model, codec), codec) for codec in codecs]

    def tell(done: int, total: int) -> None:
        print(f"\r{done}/{total} windows", end="", flush=True)

    (_, one), (_, two) = score_many(original, variants, windows, progress=tell)
    print()
    assert one.nll_ref is not None and one.kld is not None and one.same_top1 is not None and two.kld is not None
    return Numbers(windows.documents, one.nll_ref, one.nll, one.kld, one.same_top1, two.kld)


def spread(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """One window of each of `size` equal parts."""
    edges = np.arange(size + 1) * count // size
    return rng.integers(edges[:-1], edges[1:])


def in_a_row(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Windows that follow each other, from anywhere."""
    return rng.integers(count - size + 1) + np.arange(size)


def coverage(
    numbers: Numbers, size: int, draws: int, draw: Draw, *, clustered: bool, resampled: bool
) -> dict[str, float]:
    """Share of draws whose interval holds the mean over all windows, for every quantity.

    clustered: intervals over documents; resampled: the windows come from a text of documents drawn with replacement.
    """
    rng = np.random.default_rng(0)
    everything = np.arange(len(numbers.documents))
    truth = {name: estimate(everything, None).value for name, estimate in numbers.quantities().items()}
    members = [np.flatnonzero(numbers.documents == document) for document in np.unique(numbers.documents)]
    held = dict.fromkeys(truth, 0)
    for _ in range(draws):
        chosen = rng.integers(len(members), size=len(members)) if resampled else np.arange(len(members))
        windows = np.concatenate([members[i] for i in chosen])
        documents = np.repeat(np.arange(len(chosen)), [len(members[i]) for i in chosen])
        drawn = draw(rng, len(windows), min(size, len(windows)))
        for name, estimate in numbers.quantities().items():
            interval = estimate(windows[drawn], documents[drawn] if clustered else None)
            assert interval.low is not None and interval.high is not None
            held[name] += interval.low <= truth[name] <= interval.high
    return {name: count / draws for name, count in held.items()}


def table(numbers: Numbers, draws: int) -> list[str]:
    """Markdown."""
    count = len(numbers.documents)
    lines = [
        "| windows | drawn | interval over | truth | " + " | ".join(numbers.quantities()) + " |",
        "|---" * (4 + len(numbers.quantities())) + "|",
    ]
    for size in (size for size in SIZES if 3 * size <= 2 * count):
        for how, draw, clustered in (
            ("in a row", in_a_row, False),
            ("spread", spread, False),
            ("spread", spread, True),
        ):
            for truth, resampled in (("this text", False), ("such texts", True)):
                found = coverage(numbers, size, draws, draw, clustered=clustered, resampled=resampled)
                cells = [f"{size} of {count}", how, "documents" if clustered else "windows", truth]
                lines.append("| " + " | ".join([*cells, *(f"{share:.1%}" for share in found.values())]) + " |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-qwen3-moe")
    parser.add_argument("--text", default="wikipedia", help="bundled evaluation set")
    parser.add_argument("--length", type=int, default=512, help="of a window, in tokens")
    parser.add_argument(
        "--codecs", nargs=2, default=["int3-g64", "int4-g64"], help="what the two variants are rounded to"
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument(
        "--numbers", type=Path, help="read the windows' scores from this file; write them where it is missing"
    )
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.numbers and args.numbers.exists():
        kept = json.loads(args.numbers.read_text())
        numbers = Numbers(**{name: np.array(kept[name]) for name in Numbers.__dataclass_fields__})
    else:
        numbers = score(args.model, args.text, args.codecs, args.length)
    if args.numbers and not args.numbers.exists():
        about = f"window means of {args.model} and of {' and '.join(args.codecs)}, rounded to nearest, on {args.text}"
        rows = {name: [float(f"{x:.4g}") for x in values] for name, values in vars(numbers).items()}
        rows["documents"] = [int(x) for x in numbers.documents]
        args.numbers.write_text(json.dumps({"about": about, **rows}, separators=(",", ":")) + "\n")
    lines = table(numbers, args.draws)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
