"""An lm-eval model that answers from a LogitSource, so that the original, a decoded model and a GGUF inside llama.cpp get the
very same requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import CalibrationError, CheckpointError, MissingExtra, NumericalError
from compress.scoring.divergence import token_nll
from compress.scoring.source import Generates, LogitSource, tails
from compress.text.chat import rendered

Share = Callable[[float], None]
KindShare = Callable[[str, float], None]
MOST_TOKENS = 256  # generated, where a task does not say; lm-eval's own number


def _unseen(*_: object) -> None:
    """Progress that nobody looks at."""


def logit_source_lm(
    source: LogitSource,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    generator: Generates | None = None,
    progress: KindShare = _unseen,
) -> Any:
    """An lm_eval.api.model.LM (a `LogitSourceLM`) that answers `loglikelihood` from a LogitSource, and `generate_until` from
    `generator`.

    All requests of one call become one lazy pass, longest first, each distinct token sequence scored once. progress is
    called with lm-eval's name of a kind of request and the share of these that is done. Raises MissingExtra without lm-eval.
    """
    return _adapter()(source, tokenizer, generator, max_length=max_length, progress=progress)


@functools.cache
def _adapter() -> Callable[..., Any]:
    """The adapter class; built late because its base class lives in an optional package."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise MissingExtra("lm-eval", "eval", "Task accuracy") from error

    class LogitSourceLM(TemplateLM):
        def __init__(self, source: LogitSource, tokenizer: Any, generator: Generates | None, **more: Any):
            super().__init__()
            self.source, self.tokenizer, self.generator = source, tokenizer, generator
            self.max_length, self.progress = more["max_length"], more["progress"]

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            """What an empty context becomes: BOS, or EOS for tokenizers without one, as in lm-eval's HFLM."""
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            """Only lm-eval's own cache of requests asks, which is not used."""
            return self.source.name

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_text(self.tokenizer, chat_history, prompt=add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            # A text that already starts with BOS must not get a second one.
            if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                special = {"add_special_tokens": False}
            return self.tokenizer.encode(string, **special)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            progress = functools.partial(self.progress, "loglikelihood")
            return answer(self.source, pairs, max_length=self.max_length, progress=progress)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            raise NotImplementedError("perplexity is scored by compress.scoring.divergence")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            if self.generator is None:
                raise NotImplementedError("a LogitSource does not generate; give a generator")
            asked = [(self.tok_encode(request.args[0]), request.args[1]) for request in requests]
            progress = functools.partial(self.progress, "generate_until")
            return generate(self.generator, self.tokenizer, asked, max_length=self.max_length, progress=progress)

    return LogitSourceLM


def answer(
    source: LogitSource,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    progress: Share = _unseen,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, is it the greedy continuation) for each (context ids, continuation ids) pair.

    Both parts hold at least one id. Sequences run through `source` longest first, so that running out of
    memory shows at once and equal lengths stand together for batching.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        tokens = tuple(context) + tuple(continuation)
        if max(tokens) >= source.vocab_size:
            raise CalibrationError(
                f"token id {max(tokens)} is outside {source.name}'s vocabulary of {source.vocab_size}; "
                "use the model's own tokenizer"
            )
        if max_length is not None:
            if len(continuation) > max_length:
                raise CalibrationError(f"a task answer of {len(continuation)} tokens exceeds the limit of {max_length}")
            tokens = tokens[-(max_length + 1) :]
        inputs.setdefault(tokens[:-1], []).append(index)  # the last token is predicted, never read
    order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    read = [max(len(pairs[index][1]) for index in inputs[tokens]) for tokens in order]
    stream = tails(source, [np.asarray(tokens, np.int64) for tokens in order], read, progress)
    for tokens, logits in zip(order, stream, strict=True):
        for index in inputs[tokens]:
            wanted = np.asarray(pairs[index][1])
            behind = logits[-len(wanted) :]
            if not np.isfinite(behind).all():
                raise NumericalError(
                    f"{source.name}: logits of task request {index} are not finite; "
                    "the weights are broken or overflow in this precision"
                )
            greedy = bool((behind.argmax(axis=1) == wanted).all())
            results[index] = (-float(token_nll(behind, wanted).sum()), greedy)
    return results


def generate(
    generator: Generates,
    tokenizer: Any,
    asked: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
    *,
    max_length: int | None = None,
    progress: Share = _unseen,
) -> list[str]:
    """Texts behind prompts, each with its settings; see `continued`. The longest prompt comes first, for which an engine
    needs the most room."""
    texts = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda index: (-len(asked[index][0]), index))
    for done, index in enumerate(order, start=1):
        texts[index] = continued(generator, tokenizer, *asked[index], max_length=max_length)
        progress(done / len(order))
    return texts


def continued(
    generator: Generates,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: Mapping[str, Any],
    *,
    max_length: int | None = None,
) -> str:
    """Text generated behind a prompt, up to the first of the stop texts, without it.

    settings: lm-eval's generation_kwargs; `until` (a text or several) and the number of tokens are read. A prompt that
    leaves no room for these loses its beginning, as in lm-eval's HFLM. CalibrationError where there is no room at all.
    """
    until = settings.get("until") or []
    stops = [text for text in ([until] if isinstance(until, str) else until) if text]
    aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((int(settings[key]) for key in aliases if settings.get(key)), MOST_TOKENS)
    if max_length is not None:
        if most >= max_length:
            raise CalibrationError(f"a task generates up to {most} tokens, the model sees {max_length}; leave it out")
        prompt = prompt[-(max_length - most) :]
    end = tokenizer.eos_token_id

    def stop(ids: Sequence[int]) -> bool:
        return ids[-1] == end or any(text in tokenizer.decode(ids) for text in stops)

    ids = generator.continuation(np.asarray(prompt, np.int64), most, stop)
    text = tokenizer.decode(ids[:-1] if ids and ids[-1] == end else ids)
    for ending in stops:
        text = text.split(ending)[0]
    return text


def chat_text(tokenizer: Any, talk: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
    """A talk in the model's own chat template. prompt: the model answers next; else the last message goes on.

    CheckpointError where the template cannot say it, even without the system's message (as lm-eval's HFLM tries).
    """
    template = tokenizer.files.chat_templates.get("default", "")
    special = {f"{name}_token": text for name, text in tokenizer.files.special.items()}
    for messages in (talk, [message for message in talk if message["role"] != "system"]):
        text = rendered(template, special, prompt=prompt, talk=messages)
        if text is not None and prompt:
            return text
        last = messages[-1]["content"]
        if text is not None and last.strip() in text:
            text = text[: (start := text.rindex(last.strip())) + len(last.lstrip())]
            return text if text[start:] == last else text[: start + len(last.strip())]  # a template may trim
    raise CheckpointError(
        f"{tokenizer.files.folder}: its chat template fails on a task's question; score with chat: false"
    )
