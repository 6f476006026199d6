"""What transformers makes of a model folder's tokenizer, and settings that make it read tokenizer.json as it is.

transformers 5 rebuilds a tokenizer by the class that tokenizer_config.json (for some models: config.json) names, out of
the vocabulary of tokenizer.json and rules of its own. With another label than the file deserves, spaces or digits are
split otherwise than when the model was trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.text.files import SETTINGS
from compress.text.probes import Departure, Probe, differences, probes
from compress.text.tokenizer import Tokenizer

AS_IT_IS = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json without changing it, in transformers 4 and 5."""
_HARMLESS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "chat_template",
    "model_max_length", "clean_up_tokenization_spaces", "padding_side", "truncation_side", "extra_special_tokens",
    "additional_special_tokens", "add_bos_token", "add_eos_token",
)  # fmt: skip
"""Settings that say what tokens mean, not how text is split."""


@dataclass(frozen=True)
class Shipped:
    """How a folder's tokenizer ships.

    settings: tokenizer_config.json where it has to change, else None; departure: what the folder's own settings would do;
    problem: what transformers does otherwise whatever they say.
    """

    settings: Mapping[str, Any] | None = None
    departure: Departure | None = None
    problem: str | None = None


@lru_cache(maxsize=2)
def shipped(tokenizer: Tokenizer) -> Shipped:
    """The settings with which transformers, where possible, gives the tokenizer's own ids; tried, not assumed."""
    files, tried = tokenizer.files, probes(tokenizer)
    own = _corrected(tokenizer)
    problem = _problem(tokenizer, files.settings, tried)
    if problem is None:
        return Shipped(own if own != files.settings else None)
    if files.data:
        for settings in _candidates(tokenizer, own):
            if _problem(tokenizer, settings, tried) is None:
                label = f"tokenizer_class {files.settings.get('tokenizer_class', 'not set')}"
                return Shipped(settings, Departure(label, f"{AS_IT_IS} in what ships", problem))
    return Shipped(None, Departure("text read by transformers as by the model", "in another way", problem), problem)


def problem_of(tokenizer: Tokenizer, folder: Path) -> str | None:
    """What transformers reads otherwise in a folder that ships; None where it gives the tokenizer's own ids."""
    return _compared(tokenizer, folder, probes(tokenizer))


def _corrected(tokenizer: Tokenizer) -> dict[str, Any]:
    """The folder's settings without what contradicts tokenizer.json: tokens that it lacks, which transformers would give
    new ids without a row of the embedding; ends that it does not put around a text, by which transformers 4 goes."""
    files, settings = tokenizer.files, dict(tokenizer.files.settings)
    if not files.data:
        return settings
    known = tokenizer.vocabulary
    for name, text in files.special.items():
        if text not in known:
            settings.pop(f"{name}_token", None)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(listed := settings.get(key), list):
            settings[key] = [token for token in listed if not isinstance(token, str) or token in known]
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        kept = {i: t for i, t in decoder.items() if isinstance(t, dict) and known.get(str(t.get("content"))) == int(i)}
        settings["added_tokens_decoder"] = kept
    for name, ids in zip(("bos", "eos"), tokenizer.ends, strict=True):
        if isinstance(settings.get(f"add_{name}_token"), bool):
            settings[f"add_{name}_token"] = tokenizer.token_id(name) in ids
    return settings


def _candidates(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings to try, those that change least first."""
    yield {**settings, "tokenizer_class": AS_IT_IS}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    decoder = {str(t.id): {"content": t.text, **{flag: getattr(t, flag) for flag in flags}} for t in tokenizer.added}
    kept = {key: settings[key] for key in _HARMLESS if key in settings}
    yield {"added_tokens_decoder": decoder, **kept, "tokenizer_class": AS_IT_IS}  # else added_tokens.json is read


def _problem(tokenizer: Tokenizer, settings: Mapping[str, Any], tried: Sequence[Probe]) -> str | None:
    """What transformers does otherwise with these settings in the folder, in words; None where it gives the same ids."""
    files = tokenizer.files
    if settings == files.settings:
        return _compared(tokenizer, files.folder, tried)
    with tempfile.TemporaryDirectory(prefix="compress-tokenizer-") as name:
        folder = Path(name)
        for file in files.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != SETTINGS and file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        return _compared(tokenizer, folder, tried)


def _compared(tokenizer: Tokenizer, folder: Path, tried: Sequence[Probe]) -> str | None:
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        encode = lambda text, ends: theirs.encode(text, add_special_tokens=ends)  # noqa: E731
        found = differences(tokenizer, encode, tried)
    except BaseException as error:  # any type, and panics of tokenizers' Rust code, which are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, CompressError)):
            raise
        return f"transformers does not load it ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        transformers.logging.set_verbosity(level)
    return f"transformers reads text otherwise: {found[0]}" if found else None
