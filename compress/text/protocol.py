"""How a text becomes windows, and which of their tokens count. A perplexity means something only beside its protocol.

Texts that are scored token by token under different protocols give different numbers for the same model and file: a window's
first tokens have little context, so counting its second half only (llama-perplexity) or windows that overlap (the
"sliding window" of transformers' documentation) give lower ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

ProtocolName = Literal["default", "llama-perplexity", "sliding-window"]
Joiner = Literal["end of text", "blank line", "none"]
Bos = Literal["before", "in place", "none"]
Counted = Literal["all", "second half"]


@dataclass(frozen=True)
class Protocol:
    """Lengths and strides are in tokens, a beginning-of-text token included.

    length    of a window, which is all the context that its last token has
    stride    from one window's start to the next one's. None: length, so that windows do not overlap; less: of each window
              but the first only the last `stride` tokens count, so that every token counts once
    joiner    between documents: each is tokenized alone and closed by the end-of-text token (where the tokenizer has
              one); or all are one text, with a blank line or nothing between
    bos       where the tokenizer starts texts with a beginning-of-text token: every window is that token and
              `length - 1` tokens of text ("before"); the text starts with it, and in every window it stands in place of
              the first token ("in place"); or there is none
    counted   "second half": only tokens behind the first `length // 2 + 1` of a window
    as_file   the files as they are, less a last line end, instead of in their set's wording

    Nothing predicts a window's first token, so it never counts.
    """

    name: ProtocolName = "default"
    length: int = 512
    stride: int | None = None
    joiner: Joiner = "end of text"
    bos: Bos = "before"
    counted: Counted = "all"
    as_file: bool = False

    def __str__(self) -> str:
        """The name, and what differs from the protocol of that name but for the sizes, which scores give as numbers."""
        usual = PROTOCOLS[self.name]
        changed = [
            f"{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in ("name", "length", "stride")
            and getattr(self, field.name) != getattr(usual, field.name)
        ]
        return ", ".join([self.name, *changed])


DEFAULT = Protocol()
PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    protocol.name: protocol
    for protocol in (
        DEFAULT,
        # tools/perplexity of llama.cpp without --ppl-stride: chunks of n_ctx tokens follow each other, rows n_ctx / 2 to
        # n_ctx - 2 of each are scored
        Protocol("llama-perplexity", joiner="blank line", bos="in place", counted="second half", as_file=True),
        # "Perplexity of fixed-length models" in transformers' documentation
        Protocol("sliding-window", length=1024, stride=512, joiner="blank line", bos="none"),
    )
}
