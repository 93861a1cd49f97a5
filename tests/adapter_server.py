"""CivitAI, Replicate and a hostile host on loopback for tests: real sockets, and every way to misbehave."""

from __future__ import annotations

import io
import json
import ssl
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

import numpy as np
from safetensors.numpy import save

from tests.hub_server import running

_PIECE = 1 << 14


@dataclass
class Page:
    """What lies at a path, and how it is sent. Attributes may be changed while it is served."""

    content: bytes = b""
    kind: str = "application/octet-stream"
    redirect: str = ""
    token: str = ""
    """Without this bearer the answer is `refused`."""
    refused: int = 401
    statuses: list[int] = field(default_factory=list)
    """Answered first, one each."""
    retry_after: str = ""
    once: bool = False
    """Whether one address, with its query, is answered only once, as signed ones are for a while."""
    ranges: bool = True
    mark: str = '"one"'
    cuts: list[int] = field(default_factory=list)
    """After how many bytes of an answer the connection is cut, one each; only answers of more than a byte count."""
    length: int | None = None
    """What is announced as the file's size, whatever is sent."""
    says_length: bool = True
    endless: bool = False
    pause: float = 0.0
    """Seconds between pieces."""
    encoding: str = ""


@dataclass
class Asked:
    """One request, and the bytes of a body that were sent for it."""

    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class Site:
    """What a host has, and what it was asked."""

    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    address: str = ""
    silent: bool = False
    used: set[str] = field(default_factory=set)

    def sent(self, path: str) -> int:
        """Bytes of bodies that were sent for a path."""
        return sum(each.sent for each in self.asked if each.path == path)


def lora(rank: int = 2, width: int = 64, layers: int = 2, value: float = 0.5, prefix: str = "transformer.") -> bytes:
    """A LoRA for FLUX in safetensors."""
    tensors = {}
    for layer in range(layers):
        name = f"{prefix}transformer_blocks.{layer}.attn.to_q"
        tensors[f"{name}.lora_A.weight"] = np.full((rank, width), value, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.full((width, rank), value, np.float32)
    return save(tensors)


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """An archive."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, to in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, to
            archive.addfile(entry)
    return target.getvalue()


@contextmanager
def served(site: Site, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Site]:
    """The site at `site.address` while the block runs, by TLS where there is a context."""
    server = ThreadingHTTPServer((host, 0), _Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.site = site  # type: ignore[attr-defined]
    site.address = f"http{'s' if context else ''}://{host}:{server.server_port}"
    with running(server):
        yield site


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is `Site.asked`."""

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        site = cast(Site, self.server.site)  # type: ignore[attr-defined]
        while site.silent:
            time.sleep(0.02)
        path = urlsplit(self.path).path
        asked = Asked(path, dict(self.headers))
        site.asked.append(asked)
        try:
            self._answer(site.pages.get(self.path) or site.pages.get(path), asked)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, page: Page | None, log: Asked) -> None:
        if page is None:
            return self._status(404)
        if page.statuses:
            return self._status(page.statuses.pop(0), {"Retry-After": page.retry_after} if page.retry_after else {})
        if page.token and self.headers.get("Authorization") != f"Bearer {page.token}":
            return self._status(page.refused)
        site = cast(Site, self.server.site)  # type: ignore[attr-defined]
        if page.once and self.path in site.used:
            return self._status(403)
        site.used.add(self.path)
        if page.redirect:
            return self._status(307, {"Location": page.redirect.replace("COUNT", str(len(site.asked)))})
        size = page.length if page.length is not None else len(page.content)
        begin, end = 0, size
        asked = self.headers.get("Range", "")
        ranged = asked and page.ranges and self.headers.get("If-Range", page.mark) == page.mark
        if ranged:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, size)
        self.send_response(206 if ranged else 200)
        headers = {"Content-Type": page.kind, "ETag": page.mark, "Content-Encoding": page.encoding}
        if ranged:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if page.says_length and not page.endless:
            headers["Content-Length"] = str(end - begin)
        else:
            self.close_connection = True
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        return self._send(page, begin, end, log)

    def _send(self, page: Page, begin: int, end: int, log: Asked) -> None:
        most = page.cuts.pop(0) if page.cuts and end - begin > 1 else end - begin
        while page.endless or log.sent < min(most, end - begin):
            at = begin + log.sent
            piece = page.content[at : min(at + _PIECE, begin + most, end)] or (bytes(_PIECE) if page.endless else b"")
            if not piece:
                break
            self.wfile.write(piece)
            log.sent += len(piece)
            time.sleep(page.pause)
        if log.sent < end - begin:
            self.close_connection = True

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def civitai(site: Site, content: bytes, sha256: str, **page: object) -> Page:
    """Let a site be CivitAI: model 12 has versions 34 (the newest, FLUX) and 33 (SDXL). Returns the file's page."""
    file = {
        "name": "../../Style One.safetensors",
        "type": "Model",
        "sizeKB": len(content) / 1024,
        "metadata": {"format": "SafeTensor", "fp": "fp16"},
        "hashes": {"SHA256": sha256.upper(), "AutoV2": "x"},
        "primary": True,
        "downloadUrl": "https://elsewhere.example/api/download/models/34?type=Model&format=SafeTensor&fp=fp16",
    }
    pickle = {"name": "style.ckpt", "type": "Model", "metadata": {"format": "PickleTensor"}}
    newest = {"id": 34, "modelId": 12, "baseModel": "Flux.1 D", "status": "Published", "files": [pickle, file]}
    newest |= {"trainedWords": ["stylish\n", "one"], "model": {"type": "LORA", "name": "Style"}}
    draft = newest | {"status": "Draft", "id": 35}
    older = newest | {"id": 33, "baseModel": "Illustrious"}
    answers = {
        "models/12": {"id": 12, "type": "LORA", "modelVersions": [draft, newest, older]},
        "models/13": {"id": 13, "type": "Checkpoint", "modelVersions": [newest]},
        "models/14": {"id": 14, "type": "LORA", "modelVersions": [newest | {"files": [pickle]}]},
        "models/15": {"id": 15, "type": "LORA", "modelVersions": "nonsense"},
        "model-versions/34": newest,
        "model-versions/33": older,
    }
    for path, answer in answers.items():
        site.pages[f"/api/v1/{path}"] = Page(json.dumps(answer).encode(), kind="application/json", ranges=False)
    found = Page(content, **page)  # type: ignore[arg-type]
    site.pages["/api/download/models/34"] = site.pages["/api/download/models/33"] = found
    return found
