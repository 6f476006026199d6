"""Where bytes and scores come from: versions of the packages that decide them, and the machine."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compress import __version__
from compress.machine import look, threads

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf", "llama-cpp-python", "bitsandbytes",
    "compressed-tensors", "lm-eval", "datasets",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of this package and of those that decide bytes or scores, as far as they are installed."""
    found = {"compress": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: str, products: str = "float32") -> dict[str, Any]:
    """Processor, the cores and threads that are used of it, device, Python and system. products: how those of the calibration text
    are computed, in words."""
    cpu = look().cpu
    return {
        "cpu": cpu.model,
        "cores": cpu.cores,
        "threads": threads(),
        "device": device,
        "products": products,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "bytes_depend_on": ["cpu", "threads", "device", "versions"],  # sums of floats depend on their order
    }
