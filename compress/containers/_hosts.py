"""Engines as memory sees them: what each takes to run an artifact, beside its weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codecs.names import codec_info, stored_bytes
from compress.limits import RUNTIME_BYTES

if TYPE_CHECKING:
    from compress.models.layers.base import Past


@dataclass(frozen=True)
class Host:
    """An engine as memory sees it: what it takes to run an artifact beside the weights.

    name: of the engine; cache: codecs that its cache of keys and values may have, what it takes by itself first; slides: drops
    what lies behind a sliding window; layers: may put some layers, or their experts, on a GPU and compute the others on the CPU;
    gpu: runs on GPUs alone; batch: tokens that it computes at once while it reads a prompt; process: bytes that it takes by
    itself; spare: bytes of a GPU that it leaves free; share: of a GPU's memory that it takes at most. start, context_flag,
    cache_flag: what to type, with `{file}`, `{tokens}` and `{codec}`; "" where there is no such command or choice.
    """

    name: str
    cache: tuple[str, ...] = ("f16",)
    slides: bool = False
    layers: bool = False
    gpu: bool = False
    batch: int = 512
    process: int = RUNTIME_BYTES
    spare: int = 0
    share: float = 1.0
    start: str = ""
    context_flag: str = ""
    cache_flag: str = ""

    def past_bytes(self, past: Past, tokens: int, codec: str) -> int:
        """Bytes of what it keeps of one sub-layer's past after so many tokens. codec: of keys and values."""
        if past.window is not None and self.slides:
            tokens = min(tokens, past.window)
        return 4 * past.state + (tokens * stored_bytes(codec, (1, past.token)) if past.token else 0)

    def keeps(self, past: Past, codec: str) -> bool:
        """Whether its cache of a sub-layer can have a codec: its blocks divide what lies together."""
        return not past.row or past.row % (codec_info(codec).block or 1) == 0


LLAMA = Host(
    "llama.cpp",
    ("f16", "q8_0"),
    layers=True,
    process=64 * 2**20,
    spare=2**30,
    start="llama-server -m {file}",
    context_flag="-c {tokens}",
    cache_flag="-ctk {codec} -ctv {codec} -fa on",
)
"""It attends in full where the families here have windows. spare: what its own --fit leaves of a GPU."""
VLLM = Host(
    "vLLM",
    slides=True,
    gpu=True,
    batch=2048,
    share=0.9,
    start="vllm serve {file}",
    context_flag="--max-model-len {tokens}",
)
"""It takes 0.9 of a GPU by itself (--gpu-memory-utilization) and reads 2,048 tokens at once (--max-num-batched-tokens)."""
WHOLE = Host("transformers", slides=True)
"""It keeps keys and values as the model computes them, in 16-bit floats; a prompt, which it reads at once, is counted as one of
512 tokens."""
