"""Rows of a set on the Hugging Face hub, streamed: what is wrong with it is one line within seconds, not minutes of retries."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import MissingExtra, NoSuchText
from compress.text.rows import kind_of

SHUFFLE_BUFFER = 10_000  # rows that are held to draw from
SECONDS = 10.0  # in which the hub has to answer
TOLD_EVERY = 250  # rows between two signs of life
Progress = Callable[[float, str], None]
"""Told the finished fraction, 0 to 1, and what is being done."""

_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<name>[\w.+-]+))?")


def hub_id(name: str) -> dict[str, str] | None:
    """owner/name or owner/name:config as keys of a set's `hub`; None for what is a file's name, or no id."""
    found = _ID.fullmatch(name)
    if found is None or kind_of(name) is not None or name.endswith((".yaml", ".yml")):
        return None
    return {key: value for key, value in found.groupdict().items() if value is not None}


def hub_rows(hub: Mapping[str, str], seed: int | None, progress: Progress | None = None) -> Iterator[Mapping[str, Any]]:
    """The rows of a set, in its order or shuffled by `seed` as far as a buffer goes.

    hub: path, and if they are known name (of the configuration) and split. Raises NoSuchText where the hub cannot be
    reached or does not have it, MissingExtra without the `datasets` package.
    """
    path = hub["path"]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra("datasets", "hub", f"the set '{path}' of the hub") from error
    try:
        if not Path(path).exists():
            ask(path)
        rows = load_dataset(path, hub.get("name"), split=hub.get("split", "train"), streaming=True)
        if seed is not None:
            rows = _shuffled(rows.shuffle(seed=seed, buffer_size=1), seed, path, progress)
        yield from rows
    except Exception as error:  # many types: no network, no such set, configuration or split, a set that is a program
        fix = "check its name (owner/name or owner/name:config), 'split' and the network, or use a local set"
        raise NoSuchText(f"cannot read hub set '{path}': {_reason(error)}; {fix}") from error


def ask(path: str) -> None:
    """Whether the hub knows a set, asked once: `datasets` itself would retry for half a minute. Raises OSError or ValueError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().dataset_info(path, timeout=SECONDS)
    except GatedRepoError:
        raise ValueError("its owner wants to be asked; accept its terms on the hub and log in") from None
    except RepositoryNotFoundError:
        raise ValueError("the hub has no such set, or does not show it to you") from None
    except OfflineModeIsEnabled:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing is fetched") from None
    except (HFValidationError, OSError, ValueError):
        raise
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise ConnectionError(f"no connection to the hub ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The first line of an error; all of it where the rest says which values would do."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:300] if isinstance(error, ValueError) else text.splitlines()[0][:300]


def _shuffled(
    rows: Iterator[Mapping[str, Any]], seed: int, name: str, progress: Progress | None
) -> Iterator[Mapping[str, Any]]:
    """Rows drawn at random from the next SHUFFLE_BUFFER ones."""
    draw = random.Random(seed)
    held: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if progress is not None and len(held) < SHUFFLE_BUFFER and number % TOLD_EVERY == 1:
            progress(0.0, f"{name}: {number:,} rows")
        if len(held) < SHUFFLE_BUFFER:
            held.append(row)
            continue
        place = draw.randrange(SHUFFLE_BUFFER)
        yield held[place]
        held[place] = row
    draw.shuffle(held)
    yield from held
