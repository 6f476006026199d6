"""docs/models.md of what tests have proved:

    COMPRESS_PROOFS=proofs.jsonl pytest tests/contract/test_families.py tests/integration/test_gguf_container.py \
        tests/integration/test_other_mixers.py tests/integration/test_recipes_families.py tests/integration/test_models_doc.py \
        -k "logits_are_transformers or llama_cpp_computes or test_recipe or reach"
    python -m tests.models_matrix proofs.jsonl

A row claims what was noted, nothing else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress import catalog
from compress.models.sources import formats
from tests.proofs import noted

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
Proofs = Sequence[Mapping[str, Any]]
HEADINGS = ("family", "model_type", "logits of transformers", "logits of llama.cpp", "recipes", "folders")


def matrix(proofs: Proofs) -> list[str]:
    """A row a family: largest differences of float32 logits, recipes whose gate was passed, the containers that they wrote."""
    rows = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    for line in catalog.families():
        own = [proof for proof in proofs if proof["family"] in line.model_types]
        cells = (
            line.name,
            ", ".join(f"`{kind}`" for kind in line.model_types),
            _gap(own, "logits"),
            _gap(own, "llama.cpp", f"`{'`, `'.join(line.archs)}`: "),
            _recipes(own),
            ", ".join(sorted({name for p in own for name in p.get("containers", ()) if name != "gguf"})) or "–",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _gap(proofs: Proofs, what: str, front: str = "") -> str:
    gaps = [proof["gap"] for proof in proofs if proof["what"] == what]
    return f"{front}{max(gaps):.0e}" if gaps else "–"


def _recipes(proofs: Proofs) -> str:
    names = sorted({proof["recipe"] for proof in proofs if proof["what"] == "recipe"})
    return (", ".join(f"`{name}`" for name in names) if len(names) < 4 else f"{len(names)} of the bundled ones") or "–"


def sources() -> list[str]:
    """A row a format of quantized folders."""
    rows = [f"| {form.name} | {', '.join(f'`{m}`' for m in form.methods)} | {form.holds} |" for form in formats()]
    return ["| format | quant_method | what is read |", "|---|---|---|", *rows]


def reach(proofs: Proofs) -> list[str]:
    """What our own files of a tiny model reach."""
    rows = [
        f"| `{p['recipe']}` | {p['bits']:.2f} | {p['kld']:.3g} |"
        for p in sorted(proofs, key=lambda p: -p.get("bits", 0))
        if p["what"] == "reach"
    ]
    return ["| type | bits per weight | KL divergence, nats a token |", "|---|---|---|", *rows]


def between(text: str, mark: str) -> list[str]:
    """The lines that are generated between two marks of a document."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", text, re.DOTALL)
    assert found is not None, mark
    return found[1].splitlines()


def main(path: str) -> None:
    """Write the tables into the document."""
    proofs, text = noted(Path(path)), DOCUMENT.read_text(encoding="utf-8")
    for mark, lines in (("matrix", matrix(proofs)), ("sources", sources()), ("reach", reach(proofs))):
        before, rest = text.split(f"<!-- {mark} -->\n")
        text = (
            f"{before}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->" + rest.split(f"<!-- /{mark} -->")[1]
        )
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
