"""ERNIE 4.5, dense: Llama whose positions turn neighbouring channels."""

from __future__ import annotations

from collections.abc import Iterator

from compress.models.config import Config, Eps, Positive, Width
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class ErnieConfig(Config):
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 5e5
    tie_word_embeddings: bool = True
    use_bias: bool = False

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.use_bias:
            yield "use_bias: a bias on the output head is not supported"


class Ernie45Config(ErnieConfig):
    head_dim: Width | None = 128


def block(c: Ernie45Config, layer: int) -> Block:
    return attention(c, interleaved=True), mlp(c)


FAMILY = Family(
    model_types=("ernie4_5",),
    hf_architecture="Ernie4_5ForCausalLM",
    config=Ernie45Config,
    gguf=Gguf("ernie4_5"),
    block=block,
)
