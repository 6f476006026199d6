"""README.md of a folder that only compress reads: what it is, what to import, the original's licence."""

from __future__ import annotations

import json

from compress.codecs.names import codec_info
from compress.containers.base import WriteRequest
from compress.models.identity import Identity


def card(request: WriteRequest) -> str:
    """Markdown with the front matter of a model card."""
    identity, told = request.identity, request.provenance
    by = " ".join(f"{what} `{told[key]}`" for what, key in _MADE_BY if key in told)
    codecs = sorted({t.codec for t in request.tensors if codec_info(t.codec).kind != "float"})
    return _CARD.format(
        front=_front_matter(identity),
        name=request.path.name,
        model=identity.version,
        by=f" by {by}" if by else "",
        codecs=", ".join(f"`{codec}`" for codec in codecs) or "none",
        licence=_licence(identity),
    )


_MADE_BY = (("compress", "compress.version"), ("with the recipe", "compress.recipe"))
_CARD = """{front}# {name}

`{model}`, compressed{by}. Codecs: {codecs}.

The weights are packed. `pip install compress-llm`, and import it before the model is loaded:

```python
import compress
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Without that import transformers refuses the folder. `trust_remote_code=True` makes it run `configuration_compress.py`, which
imports compress. No other engine reads this format.

{licence}
"""


def _front_matter(identity: Identity) -> str:
    """What the hub reads; JSON's strings are YAML's, too."""
    said = {
        "license": identity.license,
        "license_name": identity.license_name,
        "license_link": identity.license_link,
        "base_model": identity.id if identity.commit else "",  # what has a commit came from the hub
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in said.items() if value]
    return "".join(("---\n", *lines, "---\n\n")) if lines else ""


def _licence(identity: Identity) -> str:
    name = identity.license_name or identity.license
    if not name:
        return "Licence: no model card of the original names one; its own terms hold."
    return f"Licence: {' '.join(name.split())}, says the original's model card (`README-original.md`)."
