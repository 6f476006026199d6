"""Where a model lies: a folder, a bundled demo model, or a hub id."""

from __future__ import annotations

from pathlib import Path

from compress.text import data_root


def model_location(model: str) -> str:
    """A folder as given, a bundled demo model by name or `models/name`, or a hub id."""
    if not Path(model).is_dir():
        bundled = data_root("models") / Path(model).name
        if model in (bundled.name, f"models/{bundled.name}") and bundled.is_dir():
            return str(bundled)
    return model
