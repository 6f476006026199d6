"""A hub on loopback: repositories, branches, commits and LFS objects in memory, behind the addresses that huggingface_hub's own
client asks, and with the faults that a test wants.

As the real one it takes an LFS object only if its bytes have the checksum of its name, commits only what it has, and asks for a
token where something is written or private. It does not offer Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".gguf", ".dat", ".bin")
PIECE = 1 << 14


@dataclass(frozen=True)
class Blob:
    """A file of a commit. lfs: whether git holds a pointer to it only."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git(self) -> str:
        """Git's checksum of what git holds."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0%b" % (len(held), held)).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        told = {"type": "file", "path": path, "size": len(self.data), "oid": self.git}
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {**told, "lfs": lfs} if self.lfs else told


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        named = repr((len(self.commits), sorted((name, blob.git) for name, blob in files.items())))
        oid = hashlib.sha1(named.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, Blob]:
        found = self.at(revision)
        assert found is not None
        return found[1]


@dataclass
class Hub:
    """What there is, what was asked, and what goes wrong.

    cut: number of a PUT, from 0 -> bytes after which its connection breaks; every: the same for all others; answers: answered
    once each in place of what is asked, (part of the address, status); lost: part of an address whose next answer does not
    arrive; ignored: names that a .gitignore leaves out; warnings: of every card; stall: number of a PUT that is read no
    further: `stalled` is set, and it breaks off when `freed` is.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    received: int = 0
    cut: dict[int, int] = field(default_factory=dict)
    every: int | None = None
    answers: list[tuple[str, int]] = field(default_factory=list)
    forbidden: bool = False
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lost: str = ""
    part_size: int | None = None
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    stall: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def forget(self) -> None:
        """What was asked so far."""
        self.requests.clear()
        self.puts.clear()
        self.received = 0


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Cut(Exception):
    pass


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    hub = Hub()

    class Bound(Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    ("GET", re.compile(r"/api/whoami-v2"), "whoami"),
    ("POST", re.compile(r"/api/repos/create"), "create"),
    ("POST", re.compile(r"/api/validate-yaml"), "validate"),
    ("GET", re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?"), "info"),
    ("POST", re.compile(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)"), "preupload"),
    ("POST", re.compile(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)"), "commit"),
    ("POST", re.compile(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)"), "branch"),
    ("GET", re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"), "tree"),
    ("POST", re.compile(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)"), "paths"),
    ("POST", re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"), "batch"),
    ("POST", re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify"), "verify"),
    ("PUT", re.compile(r"/store/([0-9a-f]{64})"), "put"),
    ("POST", re.compile(r"/store/([0-9a-f]{64})/complete"), "complete"),
    ("GET", re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"), "resolve"),
    ("HEAD", re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"), "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece: in two the second would wait for the client's receipt of the first
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        asked = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {asked.path}")
        self.read = 0
        try:
            for number, (part, status) in enumerate(self.hub.answers):
                if part in self.path:
                    del self.hub.answers[number]
                    self._body()
                    raise Refused(status, message="in a moment")
            for method, pattern, name in ROUTES:
                if method == self.command and (match := pattern.fullmatch(asked.path)):
                    values = [unquote(part) if part is not None else None for part in match.groups()]
                    getattr(self, name)(*values)
                    return
            self._body()
            raise Refused(404)
        except Refused as refused:
            if self.command != "HEAD":
                self._body()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        except (Cut, ConnectionError):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    # -- talk ----------------------------------------------------------------------------------------------------------
    def _body(self, seen: Callable[[int], None] = lambda count: None) -> bytes:
        """What is left of the request's body."""
        length, data = int(self.headers.get("Content-Length") or 0), bytearray()
        while self.read < length:
            piece = self.rfile.read(min(PIECE, length - self.read))
            if not piece:
                raise Cut
            self.read += len(piece)
            data += piece
            seen(self.read)
        return bytes(data)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        if self.hub.lost and self.hub.lost in self.path:
            self.hub.lost = ""
            raise Cut
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # -- who may what --------------------------------------------------------------------------------------------------
    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writer(self) -> None:
        if not self.known:
            raise Refused(401, message="Invalid username or password.")
        if self.hub.forbidden:
            raise Refused(403, message="you have no right to write here")

    def _repo(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.known):
            raise Refused(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return found

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]]:
        found = self._repo(repo).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # -- the addresses -------------------------------------------------------------------------------------------------
    def whoami(self) -> None:
        if not self.known:
            raise Refused(401, message="Invalid username or password.")
        self._json({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self._body())
        self._writer()
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos[repo] = Repo(private)
        self.hub.repos[repo].commit("main", {".gitattributes": Blob(b"*.gguf filter=lfs\n", False)}, "initial commit")
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self) -> None:
        self._body()
        self._json({"errors": [], "warnings": [{"message": warning} for warning in self.hub.warnings]})

    def info(self, repo: str, revision: str | None) -> None:
        oid, files = self._at(repo, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(files)]
        told = {"id": repo, "modelId": repo, "sha": oid, "private": self._repo(repo).private, "siblings": siblings}
        self._json({**told, "tags": [], "downloads": 0, "likes": 0})

    def preupload(self, repo: str, revision: str) -> None:
        wanted = json.loads(self._body())["files"]
        self._writer()
        _, files = self._at(repo, revision)
        answer = []
        for file in wanted:
            name, sample = file["path"], base64.b64decode(file["sample"])
            lfs = name.endswith(LFS_SUFFIXES) or b"\0" in sample or file["size"] > 10_000_000
            there = files.get(name)
            oid = None if there is None else there.sha256 if there.lfs else there.git
            told = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": name in self.hub.ignored}
            answer.append({**told, "oid": oid} if oid else told)
        self._json({"files": answer})

    def batch(self, repo: str) -> None:
        wanted = json.loads(self._body())
        self._writer()
        self._repo(repo)
        assert "basic" in wanted["transfers"] and wanted["hash_algo"] == "sha256"
        self._json(
            {"transfer": "basic", "objects": [self._object(repo, o["oid"], o["size"]) for o in wanted["objects"]]}
        )

    def _object(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        """What is to be done to bring an object: nothing, one PUT, or several and then a POST."""
        told: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.hub.objects:
            return told
        store, step = f"{self.hub.url}/store/{oid}", self.hub.part_size
        upload: dict[str, Any] = {"href": store}
        if step is not None and size > step:
            self.hub.parts[oid] = {}
            urls = {str(n + 1): f"{store}?part={n + 1}" for n in range(-(-size // step))}
            upload = {"href": f"{store}/complete", "header": {"chunk_size": str(step), **urls}}
        verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
        return {**told, "actions": {"upload": upload, "verify": verify}}

    def put(self, oid: str) -> None:
        number = len(self.hub.puts)
        self.hub.puts.append(oid)
        limit = self.hub.cut.get(number, self.hub.every)

        def seen(count: int) -> None:
            if self.hub.stall == number:
                self.hub.stalled.set()
                self.hub.freed.wait(60)
                raise Cut
            if limit is not None and count >= limit:
                raise Cut

        data = self._body(seen)
        self.hub.received += len(data)
        part = parse_qs(urlsplit(self.path).query).get("part")
        if part:
            self.hub.parts[oid][int(part[0])] = data
        else:
            self._keep(oid, data)
        self._send(200, b"", {"ETag": hashlib.md5(data).hexdigest()})

    def complete(self, oid: str) -> None:
        told = json.loads(self._body())
        parts = self.hub.parts[oid]
        for part in told["parts"]:
            if hashlib.md5(parts[part["partNumber"]]).hexdigest() != part["etag"]:
                raise Refused(400, message="another part than was sent")
        self._keep(oid, b"".join(parts[number] for number in sorted(parts)))
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, message="the bytes are not those of the object's name")
        self.hub.objects[oid] = data

    def verify(self, repo: str) -> None:
        wanted = json.loads(self._body())
        self._writer()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, message="no such object")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        self._writer()
        _, before = self._at(repo, revision)
        if revision not in self._repo(repo).branches:
            raise Refused(400, message=f"{revision} is no branch")
        files, message = dict(before), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            else:
                raise Refused(400, message=f"cannot commit {line['key']} of {value.get('path')}")
        oid = self._repo(repo).commit(revision, files, message)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def branch(self, repo: str, name: str) -> None:
        self._body()
        self._writer()
        branches = self._repo(repo).branches
        if name in branches:
            raise Refused(409, message="it is there")
        branches[name] = branches["main"]
        self._json({}, 201)

    def tree(self, repo: str, revision: str) -> None:
        files = self._at(repo, revision)[1]
        folders = {name.rpartition("/")[0] for name in files if "/" in name}
        told = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self._json(told + [blob.entry(name) for name, blob in sorted(files.items())])

    def paths(self, repo: str, revision: str) -> None:
        wanted = parse_qs(self._body().decode())["paths"]
        files = self._at(repo, revision)[1]
        self._json([files[name].entry(name) for name in wanted if name in files])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        oid, files = self._at(repo, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        blob = files[name]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.git}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, blob.data, headers)
            return
        start, stop = int(asked[1]), int(asked[2] or len(blob.data) - 1) + 1
        span = f"bytes {start}-{min(stop, len(blob.data)) - 1}/{len(blob.data)}"
        self._send(206, blob.data[start:stop], {**headers, "Content-Range": span})
