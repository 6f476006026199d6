"""Multimodal models (`...ForConditionalGeneration`) around a language model: how they call its tensors and their own. No torch.

Names as transformers' classes of these models have them; checkpoints of other versions call some otherwise (`renamed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from compress.errors import ConfigError
from compress.models.around import Names
from compress.reading import in_words


@dataclass(frozen=True)
class Wrapper:
    """One kind of multimodal model, whose config.json has the language model's own in `text_config`.

    architecture: its class; families: the language models that it may have, by model_type; body: what the names of the language
    model's tensors begin with, instead of "model."; head: in front of "lm_head"; renamed: beginnings of names in other
    checkpoints, and here; tied: what config.json means that does not say whether the head is the embeddings, None where that
    stands in text_config alone.
    """

    architecture: str
    families: tuple[str, ...]
    body: str = "model.language_model."
    head: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    tied: bool | None = None

    def here(self, name: str) -> str:
        """A checkpoint's name of a tensor as transformers' class has it."""
        for there, ours in self.renamed:
            if name.startswith(there):
                return ours + name.removeprefix(there)
        return name

    def around(self, names: Names) -> Names:
        """What the language model's tensors are called in it."""
        said = {f.name: str(getattr(names, f.name)) for f in fields(names)}
        inside = {
            key: self.body + name.removeprefix("model.") for key, name in said.items() if name.startswith("model.")
        }
        return replace(names, **{**inside, "head": self.head + names.head})


_LLAVA = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
WRAPPERS: Mapping[str, Wrapper] = {
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", ("qwen3_5_text",), tied=False),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", ("qwen3_5_moe_text",), tied=False),
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", ("gemma3_text",), renamed=_LLAVA, tied=True),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", ("gemma4_text",), tied=True),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), renamed=_LLAVA, tied=True),
    "llama4": Wrapper("Llama4ForConditionalGeneration", ("llama4_text",), "language_model.model.", "language_model."),
}
"""By model_type."""


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The kind of multimodal model that a raw config.json is of, None for a language model alone."""
    kind = config.get("model_type")
    return WRAPPERS.get(kind) if isinstance(kind, str) else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's own config.json: `config` itself, or what a wrapper has inside.

    Raises ConfigError where that is missing, or the class is another than the wrapper's.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    text, names = config.get("text_config"), config.get("architectures")
    if not isinstance(text, Mapping):
        raise ConfigError([f"text_config: expected the language model's own keys, got {in_words(text)}"])
    if isinstance(names, list) and names and wrapper.architecture not in names:
        raise ConfigError(
            [
                f"architectures: {in_words(', '.join(map(str, names)))} is no class of model_type {config['model_type']}; "
                f"{wrapper.architecture} is"
            ]
        )
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = wrapper.tied
    said = {} if tied is None or wrapper.tied is None else {"tie_word_embeddings": tied}
    return {**text, **said}
