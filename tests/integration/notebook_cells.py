"""A notebook without Jupyter: its cells one after the other in this process, and what each shows.

    python -m tests.integration.notebook_cells FILE.ipynb NAME=VALUE ...

The numbers replace those of the cell that is tagged `parameters`.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def main(file: Path, numbers: dict[str, int]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    given = None
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        print(f"--- {cell['id']}", flush=True)
        _execute("".join(cell["source"]), f"{file.name}:{cell['id']}", names)
        if "parameters" in cell["metadata"].get("tags", ()):
            given = {name for name in names if not name.startswith("__")}
            assert set(numbers) <= given, f"{file.name} has no {set(numbers) - given}"
            names |= numbers
    assert given, "no cell is tagged parameters"


def _execute(source: str, label: str, names: dict[str, Any]) -> None:
    """As a kernel does: the value of the last expression is shown."""
    tree = ast.parse(source, label)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, label, "exec"), names)
    if last is not None:
        assert isinstance(last, ast.Expr)
        _show(eval(compile(ast.Expression(last.value), label, "eval"), names))


def _show(value: Any) -> None:
    if value is None:
        return
    if hasattr(value, "_repr_mimebundle_"):
        found = value._repr_mimebundle_()
        shown = found[0] if isinstance(found, tuple) else found
        print(f"[{', '.join(sorted(shown))}]", shown.get("text/plain", ""))
    elif hasattr(value, "_repr_html_"):
        print("[text/html]", value._repr_html_())
    else:
        print(repr(value))


if __name__ == "__main__":
    path, *settings = sys.argv[1:]
    main(Path(path), {name: int(value) for name, value in (setting.split("=") for setting in settings)})
