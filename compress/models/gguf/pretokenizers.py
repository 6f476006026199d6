"""llama.cpp's pre-tokenizers and the same in tokenizer.json: known by structure and patterns, never by a model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.text.files import steps

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)  # those with case, as DeepSeek's first tokenizers list them
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's: how text is cut before tokens are merged.

    steps: "split:" and a pattern, "digits" (one by one), "bytes", "bytes+regex" (with GPT-2's pattern), in their order;
    ignores_merges: pieces that are tokens are taken whole; aliases: other names that llama.cpp knows it by; adds_bos: it puts
    the beginning-of-text token before a text where a file does not say.
    """

    name: str
    steps: tuple[str, ...]
    ignores_merges: bool = False
    aliases: tuple[str, ...] = ()
    adds_bos: bool = False


def _splits(*patterns: str) -> tuple[str, ...]:
    return tuple(f"split:{pattern}" for pattern in patterns)


PRE_TOKENIZERS = (
    PreTokenizer("qwen2", (*_splits(QWEN2), "bytes"), aliases=("deepseek-r1-qwen", "kormo", "megrez", "stablelm2")),
    PreTokenizer("qwen35", (*_splits(QWEN35), "bytes")),
    PreTokenizer(
        "llama-bpe", (*_splits(LLAMA3), "bytes"), True,
        ("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), adds_bos=True,
    ),
    PreTokenizer("smaug-bpe", (*_splits(LLAMA3), "bytes")),
    PreTokenizer("tekken", (*_splits(TEKKEN), "bytes"), True, adds_bos=True),
    PreTokenizer("deepseek-v3", (*_splits(*DEEPSEEK_V3), "bytes")),
    PreTokenizer("deepseek-llm", (*_splits(*DEEPSEEK_LLM), "digits", "bytes")),
    PreTokenizer("gpt-2", ("bytes+regex",), aliases=("phi-2", "gigachat", "mellum")),
    PreTokenizer("smollm", ("digits", "bytes+regex")),
)  # fmt: skip
"""Those that both directions know: a tokenizer.json's structure -> tokenizer.ggml.pre, and back."""


def named(pre: str) -> PreTokenizer | None:
    """By the name that a file gives, None for one that is not known here."""
    return next((known for known in PRE_TOKENIZERS if pre in (known.name, *known.aliases)), None)


def components(pre: PreTokenizer) -> list[dict[str, Any]]:
    """Its steps as tokenizer.json has them."""
    return [_component(step) for step in pre.steps]


def _component(step: str) -> dict[str, Any]:
    if step.startswith("split:"):
        pattern = {"Regex": step.removeprefix("split:")}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    regex = step == "bytes+regex"
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def pre_tokenizer(data: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a byte-level tokenizer.json, or None where it has no such one."""
    structure = tuple(_step(step) for step in steps(data.get("pre_tokenizer"), "pretokenizers"))
    ignores = bool(data["model"].get("ignore_merges"))
    alike = {known.ignores_merges: known.name for known in PRE_TOKENIZERS if known.steps == structure}
    if ignores not in alike and alike and _merges_reach_all(data["model"]):
        return alike[not ignores]  # the flag changes nothing
    return alike.get(ignores)


def _step(step: Mapping[str, Any]) -> str:
    kind = step.get("type")
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    kept = step.get("behavior") == "Removed" and step.get("invert")  # keeps the matches: the same pieces
    if kind == "Split" and (isolated or kept):
        # some files hold the line ends themselves, others their names
        return "split:" + str(step["pattern"].get("Regex")).replace("\r", "\\r").replace("\n", "\\n")
    if kind == "ByteLevel":
        return "bytes+regex" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    return f"unknown:{kind}"


def _merges_reach_all(model: Mapping[str, Any]) -> bool:
    """Whether merges alone make every token of itself, so that it does not matter whether they are skipped for one."""
    from tokenizers.models import BPE

    merges: list[tuple[str, str]] = []
    for merge in model.get("merges") or ():
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        merges.append((left, right))
    bare = BPE(vocab=dict(model["vocab"]), merges=merges)
    return all([piece.id for piece in bare.tokenize(text)] == [index] for text, index in model["vocab"].items())
