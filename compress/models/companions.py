"""What else lies in a model's folder: which files go along with its weights, and which stay behind. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

LEGAL = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "*_LICENSE*", "README.md")
"""Licence, notices and the original's own card, which every artifact takes along."""
LAYOUT = (
    "tokenizer*", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""What a folder in Hugging Face's layout needs besides."""
_REPLACED = ("config.json", "*.safetensors", "*.safetensors.index.json", "compress.json")
"""What the artifact has its own of, or what is no part of a model."""
ORIGINAL_CARD = "README-original.md"
_RENAMED = {"README.md": ORIGINAL_CARD}
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""Keys under which older versions of transformers noted paths of the machine that saved the model."""


def files_in(folder: Path) -> list[str]:
    """All files of a model folder, as paths relative to it; those one folder deep included."""
    found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    names = (path.relative_to(folder) for path in found)
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def companions(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """The files of `folder` that match one of `patterns`."""
    return (name for name in files_in(folder) if _matches(name, patterns))


def companion_bytes(folder: Path) -> int:
    """Bytes of what belongs to a model beside the weights in its folder: what goes along, and what an artifact has its own
    of."""
    own = (name for name in _REPLACED if name != "*.safetensors")
    names = companions(folder, (*LEGAL, *LAYOUT, *_RENAMED.values(), *own))
    return sum((folder / name).stat().st_size for name in names)


def left_behind(folder: Path) -> list[str]:
    """The files that no artifact takes along: code, pickled weights, pictures, whatever else lies there."""
    return [name for name in files_in(folder) if not _matches(name, (*LEGAL, *LAYOUT, *_REPLACED))]


def copy_companions(source: Path, target: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Copy what matches; the original's card under another name, and settings without paths of other machines."""
    copied = []
    for name in companions(source, patterns):
        path = target / _RENAMED.get(name, name)
        path.parent.mkdir(exist_ok=True)
        if (settings := _without_paths(source / name)) is not None:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, path)
        copied.append(path)
    return copied


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Patterns without a slash are about files at the top."""
    depth = len(PurePosixPath(name).parts)
    return any(fnmatch(name, pattern) and pattern.count("/") + 1 == depth for pattern in patterns)


def _without_paths(path: Path) -> dict[str, object] | None:
    """A settings file without the keys of `_PATHS`, or None where it has none of them."""
    if not fnmatch(path.name, "*_config.json"):
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not any(key in data for key in _PATHS):
        return None
    return {key: value for key, value in data.items() if key not in _PATHS}
