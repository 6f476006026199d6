"""What a recipe or a command calls its calibration text -> the set that it means: a name, a file, a folder, standard input, a
set of the hub, or several of these by weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.errors import CalibrationError, NoSuchText
from compress.reading import shown
from compress.text.hub import hub_id
from compress.text.rows import KINDS, STDIN, kind_of, suffixes
from compress.text.sets import TextSet, data_root, find_data, load_definition, own_file

BASE_TEXT, CHAT_TEXT = "mixed", "mixed-chat"
"""What is read where nothing else is named: for a base model, and for one whose tokenizer has a chat template."""
MOST_FILES = 20_000  # of a folder and those below it


@dataclass(frozen=True)
class TextSource:
    """What a recipe says of its text: either `dataset` or `mix`, the weights of several.

    column: of a row, what holds the text; split: of a set on the hub; template: whether talks are written in the model's
    chat template; None: where it has one.
    """

    dataset: str | None = None
    mix: Mapping[str, float] = field(default_factory=dict)
    column: str | None = None
    split: str | None = None
    template: bool | None = None

    @property
    def label(self) -> str:
        """Its name for people and for what ships: never where a file lies."""
        if not self.mix:
            return told(self.dataset or "")
        return f"{' + '.join(told(name) for name in self.mix)} ({':'.join(f'{w:g}' for w in self.mix.values())})"


def told(name: str) -> str:
    """The name of a part, of files and folders without where they lie."""
    if name == str(STDIN):
        return "standard input"
    return name if hub_id(name) and not _exists(name) else Path(name).name or name


def text_set(source: TextSource | str) -> TextSet:
    """The set that is meant, its parts proved to be there as far as this machine knows.

    Raises CalibrationError for a name that nothing has, a folder without text, options that do not go with it.
    """
    if isinstance(source, str):
        source = TextSource(source)
    if not source.mix:
        return _with_options(_named(source.dataset or ""), source.column, source.split)
    found = TextSet(name=source.label, mix=dict(source.mix), column=source.column or "", split=source.split or "")
    inside = parts(found).values()
    if source.split is not None and not any(one.hub for one in inside):
        raise CalibrationError("calibration.split goes with sets of the hub, and the mix has none; leave it out")
    return replace(found, notes=tuple(note for one in inside for note in one.notes))


def parts(definition: TextSet) -> dict[str, TextSet]:
    """The sets of a mix, by the names that it gives them; of another set none."""
    return {name: part(definition, name) for name in definition.mix}


def part(definition: TextSet, name: str) -> TextSet:
    """A set of a mix: beside its YAML where there is one, else as anywhere. CalibrationError for a mix of mixes."""
    if definition.path is not None:
        beside = definition.path.parent / f"{name}.yaml"
        found = load_definition(beside) if beside.is_file() else _named(name)
    else:
        found = _named(name)
        column = None if _is_named(name) else definition.column or None
        found = _with_options(found, column, definition.split or None if found.hub else None)
    if found.mix:
        raise CalibrationError(
            f"{definition.path or 'calibration.mix'}: '{name}' is itself a mix; name its parts instead"
        )
    return found


def _with_options(found: TextSet, column: str | None, split: str | None) -> TextSet:
    if split is not None and not found.hub:
        raise CalibrationError(f"calibration.split goes with sets of the hub, and '{found.name}' is none; leave it out")
    if column is not None and found.mix:
        raise CalibrationError(f"calibration.column: '{found.name}' is a mix, whose parts say theirs; leave it out")
    hub = {**found.hub, **({} if split is None else {"split": split})}
    if column is not None:
        found, hub = replace(found, column=column), {key: value for key, value in hub.items() if key != "column"}
    return replace(found, hub=hub)


def _is_named(name: str) -> bool:
    return own_file(name) is None and any(path.stem == name for path in data_root("calibration").glob("*.yaml"))


def _named(name: str) -> TextSet:
    if name == str(STDIN):
        return TextSet(name=told(name), files=(STDIN,))
    if (path := own_file(name)) is not None:
        return load_definition(path)
    if not _is_named(name):
        if _exists(name) and (folder := Path(name).expanduser()).is_dir():
            return _folder(folder)
        if (hub := hub_id(name)) is not None:
            return TextSet(name=name, hub=hub)
        if kind_of(name) is not None or name.startswith((".", "/", "~")):
            raise NoSuchText(f"calibration text: no file or folder '{shown(name)}'; check the path")
    return load_definition(find_data("calibration", name))


def _folder(folder: Path) -> TextSet:
    """All files of a folder and those below it that are read, by path."""
    found, others = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in files if kind_of(path.name) is not None and path.is_file()]
        others += [str(path.relative_to(folder)) for path in files if kind_of(path.name) is None]
        if len(found) + len(others) > MOST_FILES:
            raise CalibrationError(
                f"{folder}: more than {MOST_FILES:,} files in this folder and below; name the one that holds the text, or join "
                "its files, one document a line"
            )
    if not found:
        raise CalibrationError(f"{folder}: no file in this folder is text that is read ({suffixes()})")
    notes = []
    if others:
        named = ", ".join(shown(name, 40) for name in sorted(others)[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notes = [
            f"files of {folder.name} that are no text that is read, left out: {named}{more} (read: {', '.join(KINDS)})"
        ]
    return TextSet(name=folder.name or str(folder), files=tuple(sorted(found)), notes=tuple(notes))


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
