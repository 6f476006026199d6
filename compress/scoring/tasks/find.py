"""Where a task is defined: with this project, in a file of the user's, or in lm-eval, whose names are read without building
its index (14,000 files of YAML, half a minute)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from compress.errors import RecipeError
from compress.reading import shown
from compress.text import data_root, is_bundled_task

_NAME = re.compile(r"""^["']?(?:task|group)["']?:[ \t]*["']?([\w.+-]+)""", re.MULTILINE)
_TAGS = re.compile(r"""^["']?tag["']?:([^\n]*(?:\n[ \t]*-[^\n]*)*)""", re.MULTILINE)
TASK_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Definition:
    """Where lm-eval finds a task. spec: its name, or a file; folders: to look for names in, None: all of its own; bundled:
    whether its documents lie beside it."""

    spec: str
    folders: tuple[Path, ...] | None
    bundled: bool


def find_task(name: str, *, hub: bool = False) -> Definition:
    """The definition of a task, a group or a tag. hub: lm-eval's own, although one of that name is bundled.

    RecipeError for a name that nobody knows; names the nearest.
    """
    if not hub and is_bundled_task(name):
        return Definition(name, (data_root("eval") / "tasks",), True)
    if name.endswith(TASK_SUFFIXES):
        if not Path(name).is_file():
            raise RecipeError(f"no task file {shown(name)}; give the path of a YAML file in lm-eval's format")
        return Definition(name, (), False)
    known = lm_eval_names()
    if not known:  # without lm-eval nobody can tell, and nothing is asked
        return Definition(name, None, False)
    if name not in known:
        raise RecipeError(
            f"unknown task '{shown(name)}'{_suggest(name, known)}; bundled are {', '.join(bundled_tasks())}"
        )
    return Definition(name, known[name], False)


def bundled_tasks() -> list[str]:
    """Names of tasks that need no network."""
    return sorted(path.stem for path in (data_root("eval") / "tasks").glob("*.yaml"))


@cache
def lm_eval_names() -> Mapping[str, tuple[Path, ...]]:
    """Names of lm-eval's tasks, groups and tags, and the folders that define them. Seconds, once."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(next(iter(spec.submodule_search_locations))) / "tasks"
    found: dict[str, dict[Path, None]] = {}
    for path in sorted(root.glob("**/*")):
        if path.suffix in TASK_SUFFIXES or path.name.endswith("_yaml"):  # some are only there to be included
            text = path.read_text(encoding="utf-8", errors="replace")
            tags = (tag for listed in _TAGS.findall(text) for tag in re.findall(r"[\w.+]+(?:-[\w.+]+)*", listed))
            for name in (*_NAME.findall(text), *tags):
                found.setdefault(name, {})[root / path.relative_to(root).parts[0]] = None
    return {name: tuple(folders) for name, folders in found.items()}


def _suggest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name[:64], [*bundled_tasks(), *known], n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(n) for n in dict.fromkeys(near))}?)" if near else ""
