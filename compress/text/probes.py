"""Texts that show whether two tokenizers are the same one, and whether one loses what it reads."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from compress.errors import CheckpointError
from compress.text.chat import rendered
from compress.text.files import steps
from compress.text.tokenizer import Tokenizer

TEXTS = (
    "The city of London, 18 June 1922.", " a leading space", "a trailing space ", "two  spaces   three    four",
    "    indented", " ", "   ", "\n", "\n\n\n", "one\ntwo\n\nthree", "carriage\r\nreturn", "\ta\t\ttab", " \n \n",
    "0 12 345 6789 1234567890", "3.14159 1,000,000 -5e-7 0x1F", "2026-11-26T19:05:08Z", "it's we'RE I'LL they'd don't",
    "def f(x):\n    return x ** 2  # square\n", "https://example.org/a_b?c=d&e=f#g", '{"key": [1, null, "v"]}',
    "CamelCase snake_case UPPER", "~!@#$%^&*()_+-=[]{}|;':\",./<>?`", "<b>bold</b> <not a token>", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "naïve façade Übergröße", "Привет, мир!", "Ελληνικά κείμενα", "مرحبا بالعالم", "שלום עולם", "हिन्दी में लिखा", "ภาษาไทย",
    "東京は日本の首都です。", "中文文本，没有空格。", "한국어 문장입니다.", "“quoted” — ‘text’ …", "∑∫√≠ ½ αβγ №", "🙂 🚀",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪", "𐍈 𝒳 ꙮ",
)  # fmt: skip
"""Spaces, line ends, digits, code, scripts, emoji."""
DECOMPOSED = ("cafe\u0301 u\u0308ber", "ﬁne ① Å")
"""Text that normalization changes."""
_TOKENS = 24  # control tokens that are tried, from either end of the vocabulary
_SHOWN = 8  # ids in a message


@dataclass(frozen=True)
class Probe:
    """A text; tokens: whether it holds control tokens; token: the id that the whole text is."""

    text: str
    tokens: bool = False
    token: int | None = None


@dataclass(frozen=True)
class Difference:
    """The first ids in which two tokenizers differ on a text."""

    probe: Probe
    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def __str__(self) -> str:
        at = next((i for i, (a, b) in enumerate(zip(self.ours, self.theirs, strict=False)) if a != b), None)
        start = min(len(self.ours), len(self.theirs)) if at is None else at
        ours, theirs = (
            ", ".join(map(str, ids[start : start + _SHOWN])) or "nothing" for ids in (self.ours, self.theirs)
        )
        return f"{self.probe.text[:60]!r} is {theirs} instead of {ours} from id {start} on"


@dataclass(frozen=True)
class Departure:
    """Something about the tokenizer that is done otherwise than its files or an engine would have it."""

    wanted: str
    used: str
    reason: str

    def __str__(self) -> str:
        return f"tokenizer: {self.wanted} -> {self.used} ({self.reason})"


def probes(tokenizer: Tokenizer) -> tuple[Probe, ...]:
    """Plain texts, control tokens alone and in a text, and what the chat templates make of a short talk."""
    foreign = tokenizer.files.foreign[:_TOKENS]
    plain = [Probe(text) for text in (*TEXTS, *DECOMPOSED, *foreign)]
    return (*plain, *_with_tokens(tokenizer), *(Probe(text, tokens=True) for text in _chats(tokenizer)))


def _with_tokens(tokenizer: Tokenizer) -> Iterator[Probe]:
    """Control tokens: the named ones first; those without a row of the embedding are no part of a text."""
    named = [tokenizer.vocabulary.get(text) for text in tokenizer.files.special.values()]
    added = [token.id for token in tokenizer.added]
    order = chain(named, *zip(added, reversed(added), strict=True))
    for index in islice((i for i in dict.fromkeys(order) if i is not None and i not in tokenizer.beyond), _TOKENS):
        text = tokenizer.tokens[index]
        yield Probe(text, tokens=True, token=index)
        for around in (f"a{text}b", f"one {text} two", f"{text}\nthree {text}{text}"):
            yield Probe(around, tokens=True)


def _chats(tokenizer: Tokenizer) -> Iterator[str]:
    """What the default chat template makes of a talk, with and without the beginning of an answer."""
    template, special = tokenizer.chat_template, tokenizer.template_tokens
    for prompt in (False, True):
        if template is not None and (text := rendered(template, special, prompt=prompt)):
            yield text


def differences(
    tokenizer: Tokenizer,
    encode: Callable[[str, bool], Sequence[int]],
    tried: Sequence[Probe],
    around: Sequence[bool] = (False, True),
) -> list[Difference]:
    """Where another tokenizer gives other ids. encode: of a text, with the tokens that are put around one or without;
    around: which of the two is compared."""
    found = []
    for ends in around:
        ours = tokenizer.encode_batch([probe.text for probe in tried], add_special_tokens=ends)
        for probe, ids in zip(tried, ours, strict=True):
            theirs = tuple(int(index) for index in encode(probe.text, ends))
            if theirs != tuple(ids):
                found.append(Difference(probe, tuple(ids), theirs))
    return found


# -- one tokenizer on its own --------------------------------------------------------------------------------------------
def prove(tokenizer: Tokenizer) -> list[Departure]:
    """That a tokenizer reads text: CheckpointError where ordinary text comes back as another one. Returns what deserves a
    line, e.g. settings that contradict the file, or tokens without a row of the embedding.

    Byte-level tokenizers promise to give every text back, those with a decoder at least words and their spaces.
    """
    ids = [index for row in tokenizer.encode_batch([t for t in TEXTS if t.isascii()]) for index in row]
    if not ids or sum(index == tokenizer.unknown_id for index in ids) > len(ids) / 2:
        raise CheckpointError(
            f"{tokenizer.files.path} does not know ordinary text; fetch the model's own tokenizer again"
        )
    for text in TEXTS:
        if (_byte_level(tokenizer) or text.isascii()) and (back := _lost(tokenizer, text)) is not None:
            raise CheckpointError(
                f"{tokenizer.files.path} loses text: {text!r} comes back as {back!r}; fetch the model's own tokenizer again"
            )
    probes(tokenizer)  # the chat templates are read, at least
    return [*_foreign(tokenizer), *_renumbered(tokenizer), *_contradictions(tokenizer), *_without_rows(tokenizer)]


def _lost(tokenizer: Tokenizer, text: str) -> str | None:
    """What a text comes back as where that is another one, as far as the tokenizer promises anything."""
    files = tokenizer.files
    if files.data and not files.data.get("decoder"):
        return None
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(ids)
    normalizers = {step.get("type") for step in steps(files.data.get("normalizer"), "normalizers")}
    if _byte_level(tokenizer) and normalizers <= {"NFC"}:
        same = _plain(back).lstrip(" ") == _plain(text).lstrip(" ")
    else:  # may fold case, widths and spaces, and leave out what it does not know
        unknown = tokenizer.unknown_id in ids and not text.replace(" ", "").isalpha()
        same = unknown or _folded(back) == _folded(text) or _joined(tokenizer, back, text)
    return None if same else back


def _joined(tokenizer: Tokenizer, back: str, text: str) -> bool:
    """Whether only spaces differ, in the text of a tokenizer that splits at them and does not keep them."""
    keeps = tokenizer.files.model.get("type") in ("BPE", "Unigram") or not tokenizer.files.data
    return not keeps and "".join(_folded(back).split()) == "".join(_folded(text).split())


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _byte_level(tokenizer: Tokenizer) -> bool:
    return any(
        step.get("type") == "ByteLevel" for step in steps(tokenizer.files.data.get("pre_tokenizer"), "pretokenizers")
    )


def _foreign(tokenizer: Tokenizer) -> Iterator[Departure]:
    if foreign := tokenizer.files.foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        yield Departure(
            f"token {foreign[0]!r}{more}", "plain text", "tokenizer.json has none, whatever lies beside it says"
        )


def _renumbered(tokenizer: Tokenizer) -> Iterator[Departure]:
    for token in tokenizer.files.added:
        if (index := tokenizer.vocabulary.get(token.text)) != token.id:
            yield Departure(f"token {token.text!r} with id {token.id}", f"id {index}", "the first free one counts")


def _contradictions(tokenizer: Tokenizer) -> Iterator[Departure]:
    """tokenizer.json says what is put around a text; settings beside it that say otherwise do not count."""
    for name, ids in zip(("bos", "eos"), tokenizer.ends, strict=True):
        said, index = tokenizer.files.settings.get(f"add_{name}_token"), tokenizer.token_id(name)
        if tokenizer.files.data and isinstance(said, bool) and index is not None and said != (index in ids):
            used, does = ("added", "adds it") if index in ids else ("not added", "adds none")
            yield Departure(f"add_{name}_token: {str(said).lower()}", used, f"tokenizer.json {does}")


def _without_rows(tokenizer: Tokenizer) -> Iterator[Departure]:
    if tokenizer.beyond:
        index, text = next(iter(tokenizer.beyond.items()))
        more = f" and {len(tokenizer.beyond) - 1} more" if len(tokenizer.beyond) > 1 else ""
        yield Departure(f"token {text!r} (id {index}){more}", "left out", f"the embedding has {tokenizer.rows} rows")
