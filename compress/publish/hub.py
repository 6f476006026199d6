"""The talk with a hub through huggingface_hub: one commit with all that a run has to show, or none.

Token, endpoint (HF_ENDPOINT) and proxies are the client's own affair.
"""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from compress.errors import CompressError, NoSuchRepository, PublishError
from compress.publish.layout import Upload
from compress.report.numbers import human_bytes, human_seconds
from compress.report.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

PAUSES = (2.0, 10.0)
"""Seconds to wait before all is tried again; the client itself has tried a broken upload six times by then."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that may be others in a moment."""
PATIENCE = (30.0, 600.0, 120.0, 30.0)
"""Seconds without any answer, by connecting, reading, writing and waiting for a connection: the client would wait for ever."""
LARGE = 1 << 20
"""Bytes from which a file is sent on its own, before the commit; the client sends the others with it."""
ALMOST = 0.999
"""The share of an upload that is done when all has been read: what is on its way may have to be sent again."""
UNTOLD = (".gitattributes",)
"""What a hub itself puts into a repository."""
_OURS = (AssertionError, AttributeError, KeyError, MemoryError, NameError, TypeError)


@dataclass(frozen=True)
class Destination:
    """Where to publish. repo: owner/name; revision: a branch, made where there is none; None is the main one."""

    repo: str
    revision: str | None = None
    private: bool = False

    @property
    def branch(self) -> str:
        return self.revision or "main"


@dataclass(frozen=True)
class Published:
    """What came of it. url: of the repository at that branch; commit: its head; sent: names of the files that the commit
    changed, none where the very same had been published before; others: what else lies in the repository, and stays."""

    url: str
    commit: str
    sent: tuple[str, ...]
    others: tuple[str, ...]


def require_repository(repo: str) -> None:
    """Raises NoSuchRepository where `repo` cannot be a repository's id, in one line; asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise NoSuchRepository(f"{' '.join(str(error).split())}; name it owner/name") from None
    if "/" not in repo:
        raise NoSuchRepository(f"{repo} names no owner; name the repository owner/name, as you/{repo}")


def publish(
    uploads: tuple[Upload, ...],
    to: Destination,
    message: str,
    reporter: Reporter,
    sleep: Callable[[float], None] = time.sleep,
) -> Published:
    """Make the repository hold these files, in one commit; what it has already is not sent again.

    A broken connection is tried again after PAUSES, and nothing of it is seen in the repository until the commit. Raises
    PublishError in one line.
    """
    require_repository(to.repo)
    from huggingface_hub import HfApi

    with _quiet():
        api = HfApi()
        for pause in (*PAUSES, None):
            try:
                return _publish_once(api, uploads, to, message, reporter)
            except (CompressError, *_OURS):
                raise
            except Exception as error:  # of whichever HTTP library the hub's client uses
                if getattr(error, "filename", None):  # a file that cannot be read here
                    raise
                if pause is None or not _passes(error):
                    raise _told(error, api.endpoint, to) from None
                reporter.say(f"{_reason(error)}; trying again in {human_seconds(pause)}")
                sleep(pause)
    raise AssertionError


def _publish_once(
    api: HfApi, uploads: tuple[Upload, ...], to: Destination, message: str, reporter: Reporter
) -> Published:
    """One try, from the beginning: it finds what an earlier one has left there."""
    from huggingface_hub.utils import get_session

    get_session().timeout = PATIENCE
    with reporter.stage("ask the hub", told=False):
        _require_place(api, to)
        there = _files(api, to)
    missing = [upload for upload in uploads if not _is(upload, there.get(upload.name))]
    others = tuple(sorted(there.keys() - {upload.name for upload in uploads} - set(UNTOLD)))
    url = f"{api.endpoint}/{to.repo}" + (f"/tree/{quote(to.branch, safe='')}" if to.revision else "")
    if not missing:
        return Published(url, str(api.model_info(to.repo, revision=to.revision).sha), (), others)
    with ExitStack() as opened:
        additions = _send(api, missing, to, reporter, opened)
        with reporter.stage("commit", told=False), _warnings_said(reporter):
            commit = api.create_commit(to.repo, additions, commit_message=message, revision=to.revision).oid
    with reporter.stage("check", told=False):
        _require_there(api, missing, to, commit)
    return Published(url, commit, tuple(upload.name for upload in missing), others)


# -- the repository ----------------------------------------------------------------------------------------------------
def _require_place(api: HfApi, to: Destination) -> None:
    """The repository and the branch, made where they are not. Raises PublishError for a public one that should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = api.model_info(to.repo)
    except RepositoryNotFoundError:  # or one that a token is needed to see
        api.create_repo(to.repo, private=to.private or None, exist_ok=True)
    else:
        if to.private and not found.private:
            raise PublishError(
                f"{to.repo} is there already, and public; make it private in its settings, or leave out --private"
            )
    if to.revision is not None:
        try:
            api.model_info(to.repo, revision=to.revision)
        except RevisionNotFoundError:
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)


def _files(api: HfApi, to: Destination, commit: str | None = None) -> Mapping[str, Any]:
    """What the branch, or a commit, holds, by name."""
    tree = api.list_repo_tree(to.repo, recursive=True, revision=commit or to.revision)
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}  # folders have a tree_id


def _is(upload: Upload, entry: Any | None) -> bool:
    """Whether a file of the repository has these bytes: by sha256 where it is stored beside git, else by git's own checksum."""
    if entry is None or entry.size != upload.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == upload.sha256 and entry.lfs.size == upload.size)
    return bool(entry.blob_id == _git_checksum(upload))


def _git_checksum(upload: Upload) -> str:
    """Git's name of a blob with these bytes."""
    digest = hashlib.sha1(b"blob %d\0" % upload.size, usedforsecurity=False)
    digest.update(upload.read())
    return digest.hexdigest()


def _require_there(api: HfApi, uploads: list[Upload], to: Destination, commit: str) -> None:
    """Raises PublishError where the commit does not hold what was sent."""
    there = _files(api, to, commit)
    for upload in uploads:
        if upload.name not in there:
            raise PublishError(
                f"{upload.name} is not in commit {commit} of {to.repo}; "
                "a .gitignore in the repository may leave it out: change that and run the same command again"
            )
        if not _is(upload, there[upload.name]):
            raise PublishError(
                f"{upload.name} in commit {commit} of {to.repo} is not what was sent; run the same command again"
            )


# -- files -------------------------------------------------------------------------------------------------------------
class _Counted(io.BufferedReader):
    """A file that says how far it has been read."""

    def __init__(self, path: Path, told: Callable[[int], None]):
        super().__init__(io.FileIO(path))
        self._told = told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._told(self.tell())
        return data


def _send(
    api: HfApi, uploads: list[Upload], to: Destination, reporter: Reporter, opened: ExitStack
) -> list[CommitOperationAdd]:
    """What a commit takes, with the large files sent before it, one after the other.

    Where the hub and this machine speak Xet the client sends them that way, which takes up a file in its middle; else as LFS
    objects, of which those that the hub has are not sent again. opened: holds the files until the commit.
    """
    xet = _speaks_xet(api, to)
    large = [upload for upload in uploads if upload.size >= LARGE]
    additions = [_addition(upload, xet, lambda position: None, opened) for upload in uploads if upload not in large]
    total, before = sum(upload.size for upload in large), 0
    with _client_bars() if xet and reporter.bars else reporter.stage("upload", told=False) as progress:
        for upload in large:
            told = _teller(progress, before, total)
            told(0)
            addition = _addition(upload, xet, told, opened)
            api.preupload_lfs_files(to.repo, [addition], revision=to.revision, num_threads=1, free_memory=False)
            before += upload.size
            told(upload.size)
            additions.append(addition)
    return additions


def _teller(progress: Callable[[float, str], None], before: int, total: int) -> Callable[[int], None]:
    """Says how much of all has been sent when so much of one file has."""

    def told(position: int) -> None:
        done = before + position
        progress(min(done / total, ALMOST), f"upload {human_bytes(done)} of {human_bytes(total)}")

    return told


def _addition(upload: Upload, xet: bool, told: Callable[[int], None], opened: ExitStack) -> CommitOperationAdd:
    """told: how far the file has been read, where not Xet reads it, which takes paths only."""
    from huggingface_hub import CommitOperationAdd

    if upload.data is not None:
        return CommitOperationAdd(upload.name, upload.data if xet else io.BytesIO(upload.data))
    addition = CommitOperationAdd(upload.name, str(upload.path))
    addition.upload_info.sha256 = bytes.fromhex(upload.sha256)  # known: large files are not read once more for it
    if not xet:
        addition.path_or_fileobj = opened.enter_context(closing(_Counted(upload.path, told)))
    return addition


def _speaks_xet(api: HfApi, to: Destination) -> bool:
    """Whether files can go by Xet: the client would take it for granted where its package is installed."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    if find_spec("hf_xet") is None or constants.HF_HUB_DISABLE_XET:
        return False
    url = f"{api.endpoint}/api/models/{to.repo}/xet-write-token/{quote(to.branch, safe='')}"
    return bool(get_session().get(url, headers=build_hf_headers()).status_code == 200)


# -- what the client says ----------------------------------------------------------------------------------------------
@contextmanager
def _warnings_said(reporter: Reporter) -> Iterator[None]:
    """What the client warns of, as of a card that the hub does not like, as notes in a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                reporter.say(f"note: {' '.join(str(warning.message).split())}")


@contextmanager
def _client_bars() -> Iterator[Callable[[float, str], None]]:
    """The client's own bars, which alone know how far a file is that goes by Xet."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    enable_progress_bars()
    try:
        yield lambda done, detail: None
    finally:
        disable_progress_bars()


@contextmanager
def _quiet() -> Iterator[None]:
    """The client without bars and warnings of its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    before, level = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not before:
            enable_progress_bars()


def _status(error: BaseException) -> int | None:
    """Of the hub's answer, where there is one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: Exception) -> BaseException:
    """Below what the client puts around it."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a moment: a connection that broke off, a hub that is busy."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = _cause(error)
    if isinstance(cause, OfflineModeIsEnabled | ValueError):
        return False
    return (status := _status(cause)) is None or status in PASSING


def _reason(error: Exception) -> str:
    """In one line."""
    cause = _cause(error)
    if (status := _status(cause)) is not None:
        return f"the hub answered {status}"
    text = " ".join(str(cause).split()) or type(cause).__name__
    return f"the connection to the hub broke off ({text[:200]})"


def _told(error: Exception, endpoint: str, to: Destination) -> PublishError:
    """The error for people: what it means here and what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = _cause(error)
    status = _status(cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return PublishError("HF_HUB_OFFLINE is set, so nothing is sent; unset it")
    if status == 401:
        return PublishError(
            f"{endpoint} does not know who you are (401); log in with `hf auth login`, or set HF_TOKEN, "
            f"with a token that may write to {to.repo}"
        )
    if status == 403:
        return PublishError(
            f"{endpoint} does not let you write to {to.repo} (403); log in with a token that may, or name another repository"
        )
    if _passes(error):
        return PublishError(
            f"{endpoint}: {_reason(error)}; the same command continues, and does not send again what has arrived"
        )
    said = getattr(cause, "server_message", None) or str(cause)
    where = f"{endpoint} refuses {to.repo}" + (f" ({status})" if status else "")
    return PublishError(f"{where}: {' '.join(said.split())[:400]}")
