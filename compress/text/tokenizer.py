"""The checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import CheckpointError


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer; CheckpointError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} has no tokenizer that loads ({line}); fetch tokenizer.json too") from None
