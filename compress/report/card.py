"""The model card: README.md of a run's folder and of every artifact that is a folder, for strangers who find it on a hub.

Pure: a scorecard and what reproduce.json says in, Markdown out. What an engine wants typed, containers declare; what to take, the
advice of `compress compare` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from compress.containers import CONTAINERS, Use
from compress.models.companions import is_legal
from compress.report.advice import Advice, advise, occasions
from compress.report.card_sections import (
    checked,
    code,
    escaped,
    experts,
    fallbacks,
    licence,
    making,
    reproducing,
    scores,
    table,
)
from compress.report.checksums import TOP
from compress.report.compare import Comparison, Run, compare
from compress.report.measured import cleaner, measured
from compress.report.metadata import front_matter, scheme_of
from compress.report.numbers import DASH, bits, estimate, human_bytes, interval, percent
from compress.report.reproduction import Reproduction
from compress.report.scorecard import CARD_FILE, Artifact, Scorecard, share_of

TEMPLATES = Path(__file__).parent / "templates"


def model_cards(card: Scorecard, made: Reproduction, repo: str = "") -> dict[str, str]:
    """The text of every model card of a run that passed its gate, by path: one of all that it made, and one of each artifact
    that is a folder, which is what people copy. repo: the hub id that the run is published under, where that is known."""
    cards = {CARD_FILE: _card(card, made, repo)}
    for artifact in card.artifacts:
        name = f"{artifact.path}/{CARD_FILE}"
        if name in card.cards:
            cards[name] = _card(card.model_copy(update={"artifacts": (artifact,)}), made, alone=True)
    return cards


def _card(card: Scorecard, made: Reproduction, repo: str = "", alone: bool = False) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["md"] = escaped
    title, names = _title(card, made, alone), _names(card)
    text = environment.get_template("card.md").render(_context(card, made, repo, alone) | {"title": title})
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    while "\n\n\n" in lines:
        lines = lines.replace("\n\n\n", "\n\n")
    return f"{front_matter(card, made, title, names)}\n{lines.strip()}\n"


def _title(card: Scorecard, made: Reproduction, alone: bool) -> str:
    """The original's name and what was made of it."""
    name = card.artifacts[0].path if alone else card.recipe
    return name if name.startswith(made.original.name) else f"{made.original.name}-{name}"


def _names(card: Scorecard) -> list[str]:
    """What tells the artifacts apart: their type or their container where that does, else their files."""
    for names in ([a.variant for a in card.artifacts], [a.container for a in card.artifacts]):
        if all(names) and len(set(names)) == len(names):
            return [str(name) for name in names]
    return [artifact.path for artifact in card.artifacts]


def _context(card: Scorecard, made: Reproduction, repo: str, alone: bool) -> dict[str, Any]:
    names = _names(card)
    runs = [Run(card.model_copy(update={"artifacts": (a,)}), n) for a, n in zip(card.artifacts, names, strict=True)]
    comparison = compare(runs)
    several, scored = len(names) > 1, any(artifact.scores is not None for artifact in card.artifacts)
    chosen = several and len({a.container for a in card.artifacts}) == 1 and comparison.comparable
    advised, clean = advise(comparison), cleaner(card)
    return {
        "lead": _lead(card, made),
        "several": several,
        "files": _files(card, made, dict(zip(names, card.artifacts, strict=True)), comparison, repo),
        "advice": advised.sentences if chosen else (),
        "runs": list(_runs(dict(zip(names, card.artifacts, strict=True)), advised, repo, card.loader)),
        "scores": scores(comparison) if scored else "",
        "measured": list(measured(comparison)),
        "checked": checked(card),
        "experts": list(experts(card)),
        "fallbacks": list(fallbacks(card, clean)),
        "notes": [clean(note) for note in card.notes],
        "made": making(card, made),
        "recipe": yaml.safe_dump(
            made.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        ).rstrip(),
        "reproduce": reproducing(card, made, repo, alone),
        "licence": licence(card, made),
    }


# ---------------------------------------------------------------- what it is, what to take


def _lead(card: Scorecard, made: Reproduction) -> str:
    """A few sentences: of what, how small, how close."""
    of, sizes = made.original, sorted({artifact.bytes for artifact in card.artifacts})
    commit = f" (commit {code(of.commit[:12])})" if of.commit else ""
    size = human_bytes(sizes[0]) if len(sizes) == 1 else f"{human_bytes(sizes[0])} to {human_bytes(sizes[-1])}"
    ways = "" if len(card.artifacts) == 1 else f" in {len(card.artifacts)} ways"
    before = f"; the original has {human_bytes(card.base.bytes)}" if card.base.bytes else ""
    only = card.artifacts[0] if len(card.artifacts) == 1 else None
    if only is not None and (share := share_of(only, card.base)) is not None:
        size += f", {percent(share)} of the original"
        before = f" ({human_bytes(card.base.bytes)})" if card.base.bytes else ""
    told = [f"{code(of.identity.id)}{commit}, compressed{ways}: {size}{before}."]
    if only is not None and only.scores is not None and (kld := only.scores.kld) is not None:
        figure = estimate(kld.mean, kld.low, kld.high)
        told.append(f"Its predictions are {figure} nats a token (mean KL divergence) from the original's.")
    version = card.versions.get("compress")
    told.append(f"Made with compress{f' {version}' if version else ''}, recipe {code(card.recipe)}.")
    return " ".join(told)


def _files(
    card: Scorecard, made: Reproduction, artifacts: dict[str, Artifact], comparison: Comparison, repo: str
) -> str:
    """Which file to take: a line each, in the order that they were made."""
    rows, when = {row.name: row for row in comparison.variants}, _when(comparison)
    lines = []
    for name, artifact in artifacts.items():
        scores, why = artifact.scores, [escaped(when[name])] if name in when else []
        if len({a.container for a in card.artifacts}) > 1 or not why:
            why.insert(0, f"for {_engines(artifact)}")
        lines.append(
            [
                code(_place(artifact, repo)),
                code(artifact.variant or scheme_of(made.recipe) or _codecs(card)),
                human_bytes(artifact.bytes),
                bits(artifact.bits_per_weight),
                str(interval(rows[name].kld)),
                DASH if scores is None else str(interval(scores.perplexity)),
                DASH if scores is None else str(interval(scores.top1_agreement, 100, "%")),
                "; ".join(why),
            ]
        )
    heads = ["file", "type", "size", "bits per weight", "KL divergence", "perplexity", "top-1", "when to take it"]
    shown = [n for n in range(len(heads)) if any(line[n] != DASH for line in lines)]
    return table([heads[n] for n in shown], [[line[n] for n in shown] for line in lines], 0, 1, -1)


def _place(artifact: Artifact, repo: str) -> str:
    """What commands call it."""
    return repo or TOP if artifact.path == TOP else artifact.path


def _when(comparison: Comparison) -> dict[str, str]:
    """When to take which, among those of one container: others are for other engines."""
    found: dict[str, str] = {}
    for container in dict.fromkeys(row.container for row in comparison.variants):
        rows = tuple(row for row in comparison.rows if row.original or row.container == container)
        alike = replace(comparison, rows=rows)
        found |= occasions(alike, advise(alike))
    return found


def _engines(artifact: Artifact) -> str:
    container = CONTAINERS.get(artifact.container)
    return code(artifact.container) if container is None else container.engines


def _codecs(card: Scorecard) -> str:
    """What most weights are stored in."""
    sizes: dict[str, int] = {}
    for error in card.errors:
        sizes[error.codec] = sizes.get(error.codec, 0) + error.parameters
    most = sorted(sizes, key=lambda codec: -sizes[codec])
    return ", ".join(most[:3]) + (", ..." if len(most) > 3 else "") or "as the original"


# ---------------------------------------------------------------- how to run it


@dataclass(frozen=True)
class _Runs:
    """What to type for one artifact, or for all of a container; heading: which, where there are several; instead: what else
    may be typed."""

    heading: str
    instead: str
    uses: tuple[Use, ...]
    engines: str


def _runs(artifacts: dict[str, Artifact], advice: Advice, repo: str, loader: str) -> Iterator[_Runs]:
    """One part a container: files of one format are run alike, and the recommended one, or the first, stands for them. loader:
    transformers' class for folders."""
    kinds: dict[str, list[Artifact]] = {}
    for _, artifact in sorted(artifacts.items(), key=lambda named: named[0] not in advice.picks):
        kinds.setdefault(artifact.container, []).append(artifact)
    for name in dict.fromkeys(artifact.container for artifact in artifacts.values()):
        artifact, container = kinds[name][0], CONTAINERS.get(name)
        uses = () if container is None else container.uses
        single = not artifact.is_folder and sum(not is_legal(file) for file in artifact.files) <= 1
        place = _place(artifact, repo)
        shown = [replace(use, code=use.of(place, loader)) for use in uses if single or not use.single]
        if repo and artifact.path != TOP:
            wanted = f"{artifact.path}/*" if artifact.is_folder else artifact.path
            shown.insert(0, Use("Download", f"hf download {repo} --include '{wanted}' --local-dir ."))
        instead = f"Any other file goes in the place of {code(place)}." if len(kinds[name]) > 1 else ""
        yield _Runs(escaped(name) if len(kinds) > 1 else "", instead, tuple(shown), _engines(artifact))
