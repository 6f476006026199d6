"""Execute notebooks in place: each in a kernel of its own and an empty folder, whole or not at all.

    python notebooks/execute.py [FILE.ipynb ...]       # all of them by default; `make notebooks` does that

What is stored is what a reader needs: sources, outputs, pictures. Times of cells, versions and whatever names this machine's folders
are taken out; an output that still does, an error and a warning stop it, and the file stays as it was.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = ("tags",)
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are off, so their widgets need not be there
}
PATHS = re.compile(r"(?<![\w.<:/\\-])/(?:home|root|tmp|usr|opt|var|mnt|work|private|Users)/[^\s'\"<>]*")


class Unclean(Exception):
    """A notebook that is not fit to be stored."""


def main(arguments: list[str]) -> int:
    for file in map(Path, arguments) if arguments else sorted(HERE.glob("[0-9]*.ipynb")):
        started = time.monotonic()
        print(f"{file.name} ...", end=" ", flush=True)
        try:
            executed = cleaned(*execute(json.loads(file.read_text(encoding="utf-8"))))
        except Unclean as problem:
            print(f"\nerror: {file}: {problem}", file=sys.stderr)
            return 1
        store(executed, file)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


def execute(notebook: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The notebook with the outputs of a fresh kernel, and the folder in which it ran, which is gone again."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        place = Path(folder).resolve()
        node = nbformat.reads(json.dumps(notebook), as_version=4)
        resources = {"metadata": {"path": str(place)}}
        client = NotebookClient(
            node, timeout=None, kernel_name="python3", store_widget_state=False, resources=resources
        )
        client.extra_arguments = ["--log-level=ERROR"]
        try:
            client.execute(env={**os.environ, **QUIET})
        except CellExecutionError as error:
            raise Unclean(str(error)) from error
        return json.loads(json.dumps(node)), place


def cleaned(notebook: dict[str, Any], place: Path) -> dict[str, Any]:
    """Without what differs from one execution to the next. place: where it ran. Raises Unclean for what must not be stored."""
    cells = [_cell(cell, place) for cell in notebook["cells"]]
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def _cell(cell: dict[str, Any], place: Path) -> dict[str, Any]:
    kept = {key: cell[key] for key in ("cell_type", "id") if key in cell}
    kept["metadata"] = {key: value for key, value in cell.get("metadata", {}).items() if key in CELL_METADATA}
    if cell["cell_type"] == "code":
        kept |= {"execution_count": cell["execution_count"], "outputs": [_output(o, place) for o in cell["outputs"]]}
    return {**kept, "source": _lines("".join(cell["source"]))}


def _output(output: dict[str, Any], place: Path) -> dict[str, Any]:
    if output["output_type"] == "error":
        raise Unclean(f"{output['ename']}: {output['evalue']}")
    if output.get("name") == "stderr":
        raise Unclean(f"stderr: {''.join(output['text'])}")
    kept = {key: value for key, value in output.items() if key != "transient"}
    if "text" in kept:
        kept["text"] = _lines(_text(kept["text"], place))
    if "data" in kept:
        kept["data"] = {
            kind: value if kind.startswith("image/") else _lines(_text(value, place))
            for kind, value in kept["data"].items()
        }
    return kept


def _text(text: str | list[str], place: Path) -> str:
    """Paths in the folder in which it ran are as if that were the reader's."""
    whole = "".join(text).replace(f"{place}/", "").replace(str(place), ".")
    if found := PATHS.search(whole):
        raise Unclean(f"an output names a path of this machine: {found[0]}")
    return whole


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def store(notebook: dict[str, Any], file: Path) -> None:
    """Replace the file."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, prefix=file.name, delete=False) as new:
        new.write(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    try:
        os.chmod(new.name, 0o644)
        os.replace(new.name, file)
    except OSError:
        os.unlink(new.name)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
