"""A suite's tasks made ready: found, their data loaded, which documents are asked.

A part of a task's documents is drawn with the task's name as the seed, so that a smaller part lies within a larger one, every
machine draws the same, and nothing hangs on the order of a file; unless that order is made for it (metadata `ordered`).

What a task's YAML may say of itself under `metadata`, beside lm-eval's own keys: `title` for tables, `headline` (the metric
that stands for the task), `group` (the field that names a document's group), `ordered`.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CalibrationError, CompressError
from compress.files import checksum
from compress.scoring.results import Fallback
from compress.scoring.tasks.find import TASK_SUFFIXES, Definition, find_task
from compress.text import TaskChoice, task_documents

FEWSHOT_SEED = 1234  # lm-eval's own
_SECONDS = 10  # for the hub to say anything


@dataclass(frozen=True)
class AskedTask:
    """A task, or the tasks of a group, ready to be asked.

    parts      lm-eval's tasks by name, one or the group's
    documents  of each part: the places of those that are asked, rising; None: all
    """

    name: str
    choice: TaskChoice
    parts: Mapping[str, Any]
    documents: Mapping[str, list[int] | None]

    @property
    def generates(self) -> bool:
        """Whether answers are generated, not chosen."""
        return any(part.OUTPUT_TYPE == "generate_until" for part in self.parts.values())

    @property
    def digest(self) -> str:
        """sha256 (hex) of what is asked: the documents, and how lm-eval makes requests of them and rates the answers."""
        facts = [
            (
                self.name,
                repr(self.choice),
                label,
                _settings(part),
                [part.eval_docs[place] for place in self.places(label)],
            )
            for label, part in self.parts.items()
        ]
        told = json.dumps([version("lm_eval"), facts], sort_keys=True, default=repr)
        return checksum(told.encode())

    def places(self, label: str) -> Sequence[int]:
        """Of a part's documents that are asked."""
        places = self.documents[label]
        return range(len(self.parts[label].eval_docs)) if places is None else places

    def size(self, label: str) -> int:
        """How many documents of a part are asked."""
        return len(self.places(label))


def load_tasks(tasks: Mapping[str, TaskChoice]) -> tuple[list[AskedTask], list[Fallback]]:
    """The tasks that can be asked, and a line for each that cannot: no lm-eval, data out of reach, nothing to average.

    RecipeError for a name that nobody knows, CalibrationError for a file that is no task.
    """
    if not tasks:
        return [], []
    if find_spec("lm_eval") is None:
        reason = "lm-eval is not installed: pip install 'compress-llm[eval]'"
        return [], [not_scored(tasks, reason)]
    asked: list[AskedTask] = []
    missing: dict[str, list[str]] = {}
    definitions = {name: find_task(name, hub=choice.hub) for name, choice in tasks.items()}
    remote = any(not definition.bundled for definition in definitions.values())
    with _offline_if_unreachable() if remote else contextlib.nullcontext():
        for name, definition in definitions.items():
            try:
                parts = _parts(name, definition)
                for part in parts.values():
                    _require_fit(part)
            except _Unavailable as error:
                missing.setdefault(str(error), []).append(name)
            else:
                asked.append(_asked(name, tasks[name], parts))
    names = [task.name for task in asked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CalibrationError(f"two tasks are called {twice[0]}; rename the one in a file of your own")
    return asked, [not_scored(names, reason) for reason, names in missing.items()]


def not_scored(names: Iterable[str], reason: str) -> Fallback:
    """The line for tasks that are left out for one reason."""
    return Fallback(subject="tasks", wanted=", ".join(names), used="not scored", reason=reason)


def load_documents(name: str, **_: Any) -> dict[str, Any]:
    """A task's bundled documents as lm-eval wants them ({"test": Dataset}); called from eval/tasks/*.yaml."""
    from datasets import Dataset

    return {"test": Dataset.from_list(task_documents(name))}


def declared(part: Any, key: str) -> Any:
    """What a task's YAML says of itself, or None."""
    metadata = part.get_config("metadata")
    return metadata.get(key) if isinstance(metadata, Mapping) else None


def _settings(part: Any) -> list[str]:
    """How a task makes requests and rates answers, as text."""
    keys = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "num_fewshot", "generation_kwargs",
            "metric_list", "filter_list", "target_delimiter", "fewshot_delimiter", "metadata")  # fmt: skip
    return [f"{key}: {part.get_config(key)!r}" for key in keys]


def draw(name: str, available: int, wanted: int | None, *, ordered: bool = False) -> list[int] | None:
    """Places of `wanted` documents among those there are, rising; None where that is all of them."""
    if wanted is None or wanted >= available:
        return None
    if ordered:
        return list(range(wanted))
    order = list(range(available))
    random.Random(name).shuffle(order)
    return sorted(order[:wanted])


class _Unavailable(Exception):
    """A task whose data or code cannot be had here."""


def _parts(name: str, definition: Definition) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    from compress.scoring.tasks.quiet import quiet

    folders = None if definition.folders is None else [str(folder) for folder in definition.folders]
    try:
        with quiet():
            try:
                manager = TaskManager(include_path=folders, include_defaults=folders is None)
                loaded = manager.load([definition.spec])
            except KeyError:  # a group that names tasks of other folders
                loaded = TaskManager().load([definition.spec])
    except CompressError:
        raise
    except ImportError as error:
        raise _Unavailable(f"it needs a package that is not installed: {error.name or error}") from None
    except Exception as error:  # of datasets, the hub's client, and code of tasks: any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if definition.bundled or (Path(definition.spec).is_file() and not isinstance(error, ConnectionError)):
            raise CalibrationError(f"{name}: not a task that lm-eval can load ({reason}); correct its file") from error
        raise _Unavailable(
            "the hub cannot be reached, and its data is not in the cache; connect, or leave it out"
            if _offline()
            else f"its data cannot be had from the hub: {reason}"
        ) from None
    return dict(loaded["tasks"])


def _require_fit(part: Any) -> None:
    """Raises _Unavailable for a task that cannot be asked here."""
    if part.OUTPUT_TYPE == "loglikelihood_rolling":
        raise _Unavailable("it measures the perplexity of a text; make that a suite's text")
    if getattr(part, "MULTIMODAL", False):
        raise _Unavailable("it shows more than text")
    if getattr(part, "UNSAFE_CODE", False):
        raise _Unavailable("it would execute what a model writes")
    if part.OUTPUT_TYPE == "generate_until" and (part.get_config("generation_kwargs") or {}).get("do_sample"):
        raise _Unavailable("it draws its answers at random, here they are the likeliest ones")


def _asked(name: str, choice: TaskChoice, parts: Mapping[str, Any]) -> AskedTask:
    """The documents of a group are shared out evenly among its tasks."""
    each = None if choice.documents is None else -(-choice.documents // len(parts))
    documents = {}
    for label, part in parts.items():
        if choice.fewshot is not None:
            part.set_config(key="num_fewshot", value=choice.fewshot)
        documents[label] = draw(label, len(part.eval_docs), each, ordered=bool(declared(part, "ordered")))
    own = name.endswith(TASK_SUFFIXES)  # a path says less than what the file calls its task
    return AskedTask(next(iter(parts)) if own else name, choice, parts, documents)


def _offline() -> bool:
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without the hub, data sets of it come from the cache at once or not at all, instead of after minutes of new tries."""
    import datasets.config
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if not any(before):
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of whichever HTTP library it uses
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
