"""Engines as memory sees them: what each takes to run an artifact, beside its weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.codecs.names import codec_info, stored_bytes
from compress.limits import RUNTIME_BYTES

if TYPE_CHECKING:
    from compress.models.layers.base import Past
    from compress.models.spec import ModelSpec

_ROOM = 256
"""llama.cpp keeps room for multiples of so many tokens."""


@dataclass(frozen=True)
class Host:
    """An engine as memory sees it: what it takes to run an artifact beside the weights.

    name: of the engine; cache: codecs that its cache of keys and values may have, what it takes by itself first; slides: drops
    what lies behind a sliding window, None where GGUF's architecture decides; ahead: tokens that it has room for beyond the
    window; expands: keeps keys and values where it could keep a latent, if it knows no better; layers: may put some layers, or
    their experts, on a GPU and compute the others on the CPU; gpu: runs on GPUs alone; batch: tokens that it computes at once
    while it reads a prompt; process: bytes that it takes by itself; spare: bytes of a GPU that it leaves free; share: of a
    GPU's memory that it takes at most. start, context_flag, cache_flag: what to type, with `{file}`, `{tokens}` and `{codec}`;
    "" where there is no such command or choice.
    """

    name: str
    cache: tuple[str, ...] = ("f16",)
    slides: bool | None = False
    ahead: int = 0
    expands: bool = False
    layers: bool = False
    gpu: bool = False
    batch: int = 512
    process: int = RUNTIME_BYTES
    spare: int = 0
    share: float = 1.0
    start: str = ""
    context_flag: str = ""
    cache_flag: str = ""

    def of(self, spec: ModelSpec) -> Host:
        """As it runs a model."""
        return replace(self, slides=spec.family.gguf.windows) if self.slides is None else self

    def seen(self, window: int | None, tokens: int) -> int:
        """How many of so many tokens are kept where a sub-layer looks back at `window`."""
        if window is None or not self.slides:
            return tokens
        return min(tokens, -(-(window + self.ahead) // _ROOM) * _ROOM if self.ahead else window)

    def past_bytes(self, past: Past, tokens: int, codec: str) -> int:
        """Bytes of what it keeps of one sub-layer's past after so many tokens. codec: of keys and values."""
        tokens = self.seen(past.window, tokens)
        values = past.expanded if self.expands and past.expanded else past.token
        return 4 * past.state + (tokens * stored_bytes(codec, (1, values)) if values else 0)

    def keeps(self, past: Past, codec: str) -> bool:
        """Whether its cache of a sub-layer can have a codec: its blocks divide what lies together."""
        return not past.row or past.row % (codec_info(codec).block or 1) == 0


LLAMA = Host(
    "llama.cpp",
    ("f16", "q8_0"),
    slides=None,
    ahead=512,
    layers=True,
    process=64 * 2**20,
    spare=2**30,
    start="llama-server -m {file}",
    context_flag="-c {tokens}",
    cache_flag="-ctk {codec} -ctv {codec} -fa on",
)
"""ahead: of a window it keeps a batch more. spare: what its own --fit leaves of a GPU."""
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
WHOLE = Host("transformers", slides=True, expands=True)
"""It keeps keys and values as the model computes them, in 16-bit floats; a prompt, which it reads at once, is counted as one of
512 tokens."""
