"""Who a model is: names, licence and origin as files that ship say them, and no path of this machine.

From the hub id, the hub cache's folder names, and the front matter of the model card (README.md). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.reading import Unreadable, Yaml

_CARD_CHARACTERS = 1 << 16  # of front matter; the longest on the hub list some hundred languages and tags
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Identity:
    """A model's name and what its card says.

    owner: on the hub, "" for a folder; commit: of the hub's repository, "" where that is not known.
    """

    name: str
    owner: str = ""
    commit: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The hub id, or the folder's name."""
        return f"{self.owner}/{self.name}" if self.owner else self.name

    @property
    def version(self) -> str:
        """The id with its commit, where that is known."""
        return f"{self.id}@{self.commit}" if self.commit else self.id


def hub_id(model: str) -> tuple[str, str | None]:
    """`owner/name@revision` as hub id and revision, which may be missing."""
    name, _, revision = model.partition("@")
    return name, revision or None


def identify(model: str, folder: Path) -> Identity:
    """Who the model in `folder` is, which a recipe calls `model`: a folder, or a hub id with or without a revision."""
    owner, name, commit = "", folder.absolute().name, ""
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)", folder.absolute().as_posix())
    if cached:
        owner, name, commit = cached[1], cached[2], cached[3] if _COMMIT.fullmatch(cached[3]) else ""
    elif not Path(model).exists() and _HUB.fullmatch(hub_id(model)[0]):
        owner, name = hub_id(model)[0].split("/")
    card = _front_matter(folder / "README.md")
    return Identity(
        name, owner, commit, _text(card, "license"), _text(card, "license_name"), _text(card, "license_link"),
        _texts(card, "language"), _texts(card, "tags"),
    )  # fmt: skip


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML at the top of a model card; nothing where there is none or it is damaged: a card is for people."""
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        match = re.match(r"---\s*\n(.*?)\n---", file.read(_CARD_CHARACTERS), re.DOTALL)
    try:
        data = Yaml(match[1]).data if match else None
    except Unreadable:
        return {}
    return data if isinstance(data, dict) else {}


def _text(card: Mapping[str, Any], key: str) -> str:
    value = card.get(key)
    return value.strip() if isinstance(value, str) else ""


def _texts(card: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = card.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str))
