"""Talking to a model: what turns text into ids, continues them token by token, and back, for any file or folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from compress.engines.llama_cpp import LlamaCpp
from compress.engines.open import OpenedModel, artifact_source, continues, file_container, file_set, open_model
from compress.engines.sampling import Choose
from compress.engines.streamed import StreamedSource
from compress.errors import CheckpointError
from compress.models.gguf.header import read_set
from compress.models.locate import model_location
from compress.reading import read_json
from compress.scoring.results import Fallback
from compress.scoring.source import LogitSource, tails
from compress.text.chat import rendered
from compress.text.tokenizer import Tokenizer, load_tokenizer

SUGGESTED = {
    "temperature": ("temperature", "temp"), "top_k": ("top_k", "top_k"), "top_p": ("top_p", "top_p"), "min_p": ("min_p", "min_p"),
    "repeat_penalty": ("repetition_penalty", "penalty_repeat"),
}  # fmt: skip
"""Fields of `Sampling` as generation_config.json and GGUF's general.sampling.* call them."""
SHORT = {"unknown": "unk", "padding": "pad"}
"""Special tokens that GGUF calls otherwise than templates do."""

Talk = Sequence[Mapping[str, str]]
"""Messages, each with a role (system, user, assistant) and a content."""


class Speaks(Protocol):
    """An engine that continues text token by token."""

    name: str

    def stream(self, prompt: np.ndarray, most: int, choose: Choose, *, reuse: bool = False) -> Iterator[int]:
        """Ids behind `prompt` (int64 [n], n > 0; nothing is added to it), `most` at the most, as `choose` picks them from
        logits. Ends before an end-of-generation token of the model. reuse: what the engine still holds of an earlier prompt
        that began alike is not computed again.
        """
        ...


@dataclass(frozen=True)
class Speaker:
    """A model that can be talked to.

    encode: text to ids, special tokens that are written in it included; begin: the ids that a text begins with; context: most
    tokens that it reads, None where nothing says; template: its chat template, None where it has none; special: texts of
    special tokens by the names that templates know them by; notes: what stands in for what; suggests: fields of `Sampling` as the
    model's own files advise.
    """

    engine: Speaks
    encode: Callable[[str], list[int]]
    begin: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    context: int | None
    template: str | None
    special: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    suggests: Mapping[str, float] = field(default_factory=dict)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued."""
        ids = self.encode(text)
        return ids if tuple(ids[: len(self.begin)]) == self.begin else [*self.begin, *ids]

    def question(self, talk: Talk) -> list[int]:
        """Ids of a talk in the model's chat template, up to where it answers. CheckpointError where there is no template, or
        it does not take such a talk."""
        if self.template is None:
            raise CheckpointError(
                "this model has no chat template: it continues text (compress generate), it does not chat"
            )
        text = rendered(self.template, self.special, prompt=True, talk=talk)
        if text is None:
            roles = ", ".join(message["role"] for message in talk)
            raise CheckpointError(
                f"the model's chat template takes no talk of {roles}; leave out --system, or start anew"
            )
        return self.encode(text)

    def stream(self, ids: Sequence[int], most: int, choose: Choose) -> Iterator[str]:
        """The text behind `ids` in pieces of whole characters."""
        produced: list[int] = []
        told = ""
        for token in self.engine.stream(np.asarray(ids, np.int64), most, choose, reuse=True):
            produced.append(token)
            text = self.decode(produced)
            whole = text.rstrip("\ufffd")  # bytes of a character that is not whole yet
            if len(whole) > len(told):
                yield whole[len(told) :]
                told = whole
        if produced and len(text) > len(told):
            yield text[len(told) :]


class Uncached:
    """Any source of logits as what continues text: all tokens are read again for every new one. ends: end-of-generation ids."""

    def __init__(self, source: LogitSource, ends: frozenset[int]):
        self.name, self._source, self._ends = source.name, source, ends

    def stream(self, prompt: np.ndarray, most: int, choose: Choose, *, reuse: bool = False) -> Iterator[int]:
        """See Speaks.stream."""
        so_far = np.asarray(prompt, np.int64).tolist()
        for _ in range(most):
            (last,) = tails(self._source, [np.asarray(so_far)], [1])
            token = choose(last[0], so_far)
            if token in self._ends:
                return
            so_far.append(token)
            yield token


@contextmanager
def open_speaker(target: str, context: int) -> Iterator[Speaker]:
    """A GGUF file in llama.cpp, a folder in the engine that it was written for. context: tokens that there must be room for.

    Raises CheckpointError, UnsupportedModel or MissingExtra.
    """
    location = model_location(target)
    container = file_container(location)
    if container is not None:
        with LlamaCpp(file_set(container, Path(location))[0], context=context) as llama:
            yield _file(llama)
        return
    opened, fallbacks = open_model(target), list[Fallback]()
    tokenizer = load_tokenizer(opened.folder, opened.spec.vocab_size)
    whole = continues(opened.folder, opened.files, opened.parameters) if opened.container.original else None
    if whole is not None:
        yield _folder(opened, tokenizer, cast(Speaks, whole()))
        return
    if opened.container.original and opened.stays_quantized:
        decoded = StreamedSource(opened.spec, opened.load, "decoded weights")
        running: AbstractContextManager[LogitSource] = nullcontext(decoded)
    else:
        running = artifact_source(opened.container, opened.files, opened.spec, opened.parameters, fallbacks)
    with running as source:
        notes = [f"{line.wanted} -> {line.used} ({line.reason})" for line in fallbacks]
        if isinstance(source, StreamedSource):
            ends = frozenset(i for i in (tokenizer.eos_token_id, *_ends(opened.folder)) if i is not None)
            engine: Speaks = Uncached(source, ends)
            notes.append(f"{source.name}, no cache: all tokens are read again for every new one, which is slow")
        else:
            engine = cast(Speaks, source)
        yield _folder(opened, tokenizer, engine, tuple(notes))


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _suggested(found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers among `found`, by the names of `Sampling`."""
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _ends(folder: Path) -> list[int]:
    """The end-of-generation ids that generation_config.json names."""
    named = _generation(folder).get("eos_token_id")
    return [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]


def _folder(opened: OpenedModel, tokenizer: Tokenizer, engine: Speaks, notes: tuple[str, ...] = ()) -> Speaker:
    """A folder in Hugging Face's layout, with its own tokenizer and template."""
    files, generation = tokenizer.files, _generation(opened.folder)
    return Speaker(
        engine,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer.ends[0],
        tokenizer.decode,
        opened.spec.max_positions,
        files.chat_templates.get("default"),
        {f"{name}_token": text for name, text in files.special.items()},
        notes,
        _suggested(
            {name: generation.get(key) for name, (key, _) in SUGGESTED.items()} if generation.get("do_sample") else {}
        ),
    )


def _file(engine: LlamaCpp) -> Speaker:
    """A GGUF file, with llama.cpp's tokenizer and the template in the file's metadata."""
    fields = read_set(engine.path).fields
    tokens, template = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.chat_template")
    known = tokens if isinstance(tokens, list) else []
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(known):
            special[f"{SHORT.get(name, name)}_token"] = str(known[index])
    return Speaker(
        engine,
        lambda text: engine.tokenize(text, special=True, ends=False).tolist(),
        engine.begins,
        engine.detokenize,
        engine.trained_context,
        template if isinstance(template, str) else None,
        special,
        suggests=_suggested({name: fields.get(f"general.sampling.{key}") for name, (_, key) in SUGGESTED.items()}),
    )
