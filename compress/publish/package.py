"""What is published of a run: read, held against its checksums, searched for paths of this machine. Talks to nobody."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from compress.errors import CheckpointError, CompressError, GateFailed, NoSuchRun, PublishError
from compress.files import sha256
from compress.models.companions import ORIGINAL_CARD
from compress.publish.layout import Upload, arranged, as_arranged
from compress.publish.paths import HEAD, WEIGHTS, private_path, private_places
from compress.report import reproduction
from compress.report import scorecard as scorecards
from compress.report.card import model_cards
from compress.report.checksums import OK, sentence, statuses
from compress.report.scorecard import CARD_FILE, FILE_NAME, OWN_FILES, REPRODUCE_FILE, Scorecard
from compress.streaming.journal import WORK

_FRONT_MATTER = re.compile(r"---\s*\n(.*?\n)---\s*(?:\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Package:
    """A run that may be published. card: its scorecard as it is in the repository; uploads: by their names there;
    front_matter: YAML at the top of the repository's card, "" where there is none."""

    folder: Path
    card: Scorecard
    uploads: tuple[Upload, ...]
    front_matter: str = ""

    @property
    def bytes(self) -> int:
        return sum(upload.size for upload in self.uploads)

    @property
    def message(self) -> str:
        """Of the commit, where nobody says another one."""
        version = self.card.versions.get("compress")
        return f"{self.card.recipe} of {self.card.model}" + (f", by compress {version}" if version else "")


def packaged(run: str | Path, repo: str = "") -> Package:
    """What would be published of a finished run. repo: owner/name, which its card then names in what people are to type.

    Raises NoSuchRun (nothing there, or not finished), GateFailed, CheckpointError (a file is missing or not what was
    delivered) and PublishError (a file holds a path of this machine).
    """
    folder = Path(run).parent if Path(run).name == FILE_NAME else Path(run)
    card = _finished(folder)
    known = card.everything
    for name, status in statuses(known, folder).items():
        if status != OK:
            raise CheckpointError(
                f"{sentence(folder / name, status)}; put back what was delivered, or run the recipe again with --fresh"
            )
    there = [name for name in card.told if name not in known and (folder / name).is_file()]
    places = arranged(card, there)
    told = as_arranged(card, places)
    sent = {} if told is card else {FILE_NAME: told.to_json().encode()}
    sent |= _card(folder, card, told, repo)
    uploads: dict[str, Upload] = {}
    for source, name in sorted(places.items()):
        path = folder / source
        if source in sent:
            uploads[name] = Upload.of_bytes(name, path, sent[source])
        else:  # two artifacts may share a licence
            uploads[name] = Upload(name, path, path.stat().st_size, known.get(source) or sha256(path))
    package = Package(folder, told, tuple(uploads[name] for name in sorted(uploads)), _front_matter(uploads))
    _refuse_private_paths(package)
    return package


def _finished(folder: Path) -> Scorecard:
    """The scorecard of a run that has passed its gate and knows what it delivered."""
    if not folder.is_dir():
        raise NoSuchRun(f"there is no run at {folder}; give a finished run's folder")
    if not (folder / FILE_NAME).is_file():
        if (folder / WORK).is_dir():
            raise NoSuchRun(f"{folder} holds an unfinished run; let `compress run` finish it first")
        raise NoSuchRun(f"{folder} holds no {FILE_NAME}; give a finished run's folder")
    card = scorecards.read(folder)
    if not card.gate.passed or not all(artifact.delivered for artifact in card.artifacts):
        failed = ", ".join(f"{check.name} ({check.detail})" for check in card.gate.checks if not check.passed)
        raise GateFailed(f"{folder} did not pass its gate{failed and f': {failed}'}; only what has passed is published")
    if not card.artifacts or not all(artifact.files for artifact in card.artifacts):
        raise CompressError(
            f"{folder / FILE_NAME} has no checksums of what was delivered: it is not a run's, or an earlier version's; "
            "run the recipe again with --fresh"
        )
    for artifact in card.artifacts:
        stray = [name for name in artifact.files if artifact.is_folder and not name.startswith(f"{artifact.path}/")]
        if stray:
            raise CompressError(
                f"{folder / FILE_NAME} is damaged: {stray[0]} is not in {artifact.path}; run the recipe again with --fresh"
            )
    return card


def _card(folder: Path, card: Scorecard, told: Scorecard, repo: str) -> dict[str, bytes]:
    """The run's model card as it is in the repository, by its name here: with the repository's id and the paths there. None
    where it is not the one that the run wrote: what somebody changed is sent as it is."""
    if not (folder / REPRODUCE_FILE).is_file() or not (folder / CARD_FILE).is_file():
        return {}
    made = reproduction.read(folder)
    if (folder / CARD_FILE).read_text(encoding="utf-8") != model_cards(card, made)[CARD_FILE]:
        return {}
    return {CARD_FILE: model_cards(told, made, repo)[CARD_FILE].encode()}


def _front_matter(uploads: dict[str, Upload]) -> str:
    if CARD_FILE not in uploads:
        return ""
    match = _FRONT_MATTER.match(uploads[CARD_FILE].read().decode(errors="replace"))
    return match[1] if match else ""


def _refuse_private_paths(package: Package) -> None:
    """Raises PublishError for the first file that holds one."""
    places = private_places(package.folder)
    public = "@" in package.card.model  # a commit: the original's own card is on the hub already
    for upload in package.uploads:
        if public and upload.path.name == ORIGINAL_CARD:
            continue
        own = PurePosixPath(upload.name).name in OWN_FILES
        text = upload.read(HEAD if upload.path.suffix in WEIGHTS else -1)
        if (found := private_path(text, places, own=own)) is not None:
            raise PublishError(
                f"{upload.path} holds a path of this machine: {found}; nothing that is published may, so take it out "
                f"{'of that file' if own else 'of the original and run the recipe again'}"
            )
