"""What keeps programs without compress from taking packed weights for a model: transformers only warns of a `quant_method`
that it does not know, and gives every matrix random numbers.

`transformers_weights` in config.json names the file that transformers (4.57, 5.10 to 5.17) shall load: a sentence there is an
error that quotes it, whichever class loads the folder. With `trust_remote_code=True` the Auto classes run `configuration_compress.py`
first, which imports compress. Once compress is imported neither counts: its quantizer removes the sentence, and transformers asks
for no trust where it has a class of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from compress.containers._safetensors import write_json

KEY = "transformers_weights"
FILE = "configuration_compress.py"
SETTINGS = {
    KEY: (
        "packed weights; `import compress` before you load them (pip install compress-llm), "
        "or give an Auto class trust_remote_code=True"
    ),
    "auto_map": {"AutoConfig": "configuration_compress.CompressConfig"},
}
"""Keys of config.json."""
SOURCE = '''"""Read by transformers' Auto classes with trust_remote_code=True: does what `import compress` before them does."""

from transformers import AutoConfig, PreTrainedConfig

try:
    from compress.runtime.hook import install
except ImportError as error:
    raise ImportError(
        "this model's weights are packed by compress, which is not installed: pip install compress-llm"
    ) from error

install()


class CompressConfig(PreTrainedConfig):
    """Gives the configuration that the model had before."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return AutoConfig.from_pretrained(*args, **kwargs)
'''
"""Of `FILE`. The import stands in a `try`: transformers would name other missing packages as pip calls the import."""


def protect(folder: Path) -> None:
    """Put both into a folder that transformers has saved."""
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **SETTINGS})
    (folder / FILE).write_text(SOURCE, encoding="utf-8")
