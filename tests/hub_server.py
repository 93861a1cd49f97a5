"""Hubs on loopback for tests: the parts of Hugging Face's and ModelScope's APIs that fetching a model uses.

A hub holds repositories in memory, keeps a log of what it was asked and sent, and misbehaves where it is told to: cuts
connections, sends other bytes, answers with an error, ignores ranges, is slow, or sends on to another host.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 1 << 15


@dataclass(frozen=True)
class Asked:
    """One request, and the bytes of a file that were sent for it."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int


@dataclass
class Hub:
    """What a hub holds and how it behaves. Attributes may be changed while it serves."""

    repositories: dict[str, dict[str, bytes]]
    large: tuple[str, ...] = (".safetensors", ".pth", ".model")
    """Endings of files of which SHA-256 is stated; of others git's SHA-1 is."""
    gated: bool = False
    open_listing: bool = False
    """Whether a gated repository tells what it holds, as Hugging Face's do."""
    token: str = ""
    status: dict[str, list[int]] = field(default_factory=dict)
    """Statuses that requests for a path that ends so are answered with, one each, until they are used up."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """After how many bytes of a file a connection is cut, one a request, until they are used up."""
    other_bytes: tuple[str, ...] = ()
    ignores_ranges: bool = False
    pause: float = 0.0
    """Seconds between pieces of a file."""
    silent: bool = False
    """Nothing is ever answered."""
    bytes_at: str = ""
    """Address that requests for files are sent on to."""
    asked: list[Asked] = field(default_factory=list)
    address: str = ""

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent, however often."""
        return sum(asked.sent for asked in self.asked if unquote(asked.path).endswith(name))


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.address` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub  # type: ignore[attr-defined]
    hub.address = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield hub


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """The server answers, in a thread of its own, while the block runs."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does; fails the test after a minute."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is `Hub.asked`."""

    @property
    def _hub(self) -> Hub:
        return cast(Hub, self.server.hub)  # type: ignore[attr-defined]

    def _answer(self) -> None:
        try:
            sent = self._route()
        except (BrokenPipeError, ConnectionResetError):
            sent, self.close_connection = 0, True
        self._hub.asked.append(Asked(self.command, self.path, dict(self.headers), sent))

    def _route(self) -> int:
        hub, parts = self._hub, urlsplit(self.path)
        path = unquote(parts.path)
        while hub.silent:
            time.sleep(0.05)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        place = query.get("FilePath", path)
        for ending, statuses in hub.status.items():
            if place.endswith(ending) and statuses:
                return self._error(statuses.pop(0), "")
        if path.startswith("/api/v1/models/"):
            return self._modelscope(path.removeprefix("/api/v1/models/"), query)
        if path.startswith("/api/models/"):
            return self._information(path.removeprefix("/api/models/"))
        if "/resolve/" in path:
            repository, _, rest = path.removeprefix("/").partition("/resolve/")
            return self._file(repository, *rest.split("/", 1))
        return self._error(404, "EntryNotFound")

    def _information(self, rest: str) -> int:
        repository, _, revision = rest.partition("/revision/")
        if not self._allowed(repository, revision or "main", listing=True):
            return 0
        siblings = []
        for name, content in self._hub.repositories[repository].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(self._hub.large):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        return self._json({"id": repository, "modelId": repository, "sha": COMMIT, "tags": [], "siblings": siblings})

    def _modelscope(self, rest: str, query: dict[str, str]) -> int:
        repository = "/".join(rest.split("/")[:2])
        revision = query.get("Revision", "master")
        if "FilePath" in query:
            return self._file(repository, revision, query["FilePath"])
        if not self._allowed(repository, revision):
            return 0
        files = [
            {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
            for name, content in self._hub.repositories[repository].items()
        ]
        return self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def _allowed(self, repository: str, revision: str, *, listing: bool = False) -> bool:
        """Whether the repository may be read; where not, the answer is given."""
        hub = self._hub
        if (
            hub.gated
            and not (listing and hub.open_listing)
            and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
            self._error(403, "GatedRepo")
        elif repository not in hub.repositories:
            self._error(404, "RepoNotFound")
        elif revision not in ("main", "master", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return True
        return False

    def _file(self, repository: str, revision: str, name: str) -> int:
        hub = self._hub
        if not self._allowed(repository, revision):
            return 0
        if hub.bytes_at:
            self.send_response(302)
            self.send_header("Location", f"{hub.bytes_at}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return 0
        if name not in hub.repositories[repository]:
            return self._error(404, "EntryNotFound")
        content = hub.repositories[repository][name]
        shown = bytes(len(content)) if name in hub.other_bytes else content
        asked = self.headers.get("Range", "")
        ranged = bool(asked) and not hub.ignores_ranges
        first, _, last = asked.removeprefix("bytes=").partition("-") if ranged else ("0", "", "")
        start, end = int(first), min(int(last) + 1, len(content)) if last else len(content)
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        return 0 if self.command == "HEAD" else self._send(name, shown[start:end])

    def _send(self, name: str, content: bytes) -> int:
        hub, sent = self._hub, 0
        cuts = hub.cuts.get(name, [])
        most = cuts.pop(0) if cuts else len(content)
        try:
            while sent < min(most, len(content)):
                piece = content[sent : min(sent + _PIECE, most)]
                self.wfile.write(piece)
                sent += len(piece)
                time.sleep(hub.pause)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if sent < len(content):
            self.close_connection = True
        return sent

    def _json(self, values: object) -> int:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return 0

    def _error(self, status: int, code: str) -> int:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return 0
