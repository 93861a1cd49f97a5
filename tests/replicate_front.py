"""What the cloud puts before Cog's server, so that the official `replicate` client can drive it over HTTP.

That client wants paths below /v1, models by name, polling and uploads, none of which Cog's server has. This door passes
each prediction on with a webhook, keeps what the webhooks tell, and answers from that. Nothing about pictures is here:
inputs, outputs, logs and errors pass through as they are. Not here: tokens, versions that differ, signed webhooks.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2

VERSION = "ab" * 32
_PATIENCE = 60.0  # seconds
_MODEL = re.compile(r"/v1/models/(?P<model>[\w-]+/[\w-]+)/(?P<rest>.*)")
_ENDED = ("succeeded", "failed", "canceled")
_EMPTY = dict.fromkeys(["output", "error", "logs", "metrics", "started_at", "completed_at"])


class Front:
    """The door's memory: predictions by what was last told of them, and uploaded files."""

    def __init__(self, cog: str) -> None:
        self._cog = cog
        self._changed = threading.Condition()
        self._predictions: dict[str, dict[str, Any]] = {}
        self._files: dict[str, bytes] = {}
        self.address = ""

    def create(self, body: Mapping[str, Any], model: str, prefer: str) -> tuple[int, object]:
        name = uuid.uuid4().hex
        urls = {
            "get": f"{self.address}/v1/predictions/{name}",
            "cancel": f"{self.address}/v1/predictions/{name}/cancel",
        }
        prediction = {"id": name, "model": model, "version": VERSION, "status": "starting", "urls": urls, **_EMPTY}
        prediction |= {"input": body["input"], "created_at": datetime.now(UTC).isoformat()}
        with self._changed:
            self._predictions[name] = prediction
        answer = httpx2.put(
            f"{self._cog}/predictions/{name}",
            json={"id": name, "input": body["input"], "webhook": f"{self.address}/told"},
            headers={"Prefer": "respond-async"},
            timeout=_PATIENCE,
        )
        if answer.status_code != 202:
            return answer.status_code, {"title": "refused", "status": answer.status_code, "detail": answer.text}
        if prefer.startswith("wait"):
            with self._changed:
                self._changed.wait_for(lambda: prediction["status"] in _ENDED, float(prefer.partition("=")[2] or 60))
        with self._changed:
            # The client takes "processing" for an end after it has waited.
            waited = prefer and prediction["status"] not in _ENDED
            return 201, prediction | ({"status": "starting"} if waited else {})

    def told(self, body: Mapping[str, Any]) -> tuple[int, object]:
        with self._changed:
            prediction = self._predictions[body["id"]]
            if prediction["status"] not in _ENDED:
                prediction |= {key: value for key, value in body.items() if key in prediction and key != "input"}
            self._changed.notify_all()
        return 200, {}

    def upload(self, content_type: str, content: bytes) -> tuple[int, object]:
        form = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + content)
        (part,) = [part for part in form.walk() if part.get_param("name", header="content-disposition") == "content"]
        name, sent = uuid.uuid4().hex, part.get_payload(decode=True)
        assert isinstance(sent, bytes)
        self._files[name] = sent
        return 201, {
            "id": name,
            "name": "content",
            "content_type": part.get_content_type(),
            "size": len(sent),
            "etag": name,
            "checksums": {},
            "metadata": {},
            "created_at": datetime.now(UTC).isoformat(),
            "expires_at": None,
            "urls": {"get": f"{self.address}/files/{name}"},
        }

    def version(self) -> tuple[int, object]:
        document = httpx2.get(f"{self._cog}/openapi.json", timeout=_PATIENCE).json()
        created = datetime.now(UTC).isoformat()
        return 200, {"id": VERSION, "created_at": created, "cog_version": "0", "openapi_schema": document}

    def get(self, path: str) -> tuple[int, object]:
        if path.startswith("/files/"):
            return 200, self._files[path.removeprefix("/files/")]
        if found := _MODEL.fullmatch(path):
            assert found["rest"] == f"versions/{VERSION}"
            return self.version()
        with self._changed:
            return 200, dict(self._predictions[path.removeprefix("/v1/predictions/")])

    def post(self, path: str, headers: Message, content: bytes) -> tuple[int, object]:
        if path == "/v1/files":
            return self.upload(headers["Content-Type"], content)
        if path.endswith("/cancel"):
            answer = httpx2.post(f"{self._cog}{path.removeprefix('/v1')}", timeout=_PATIENCE)
            return (200, self.get(path.removesuffix("/cancel"))[1]) if answer.is_success else (answer.status_code, {})
        body = json.loads(content)
        if path == "/told":
            return self.told(body)
        found = _MODEL.fullmatch(path)
        return self.create(body, found["model"] if found else "gesso/sdxl", headers.get("Prefer", ""))


@contextmanager
def replicate_front(cog: str) -> Iterator[str]:
    """The address that `replicate.Client(base_url=...)` takes, before the Cog server at `cog`."""
    front = Front(cog)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*front.get(self.path))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(*front.post(self.path, self.headers, content))

        def _answer(self, status: int, body: object) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = "image/png" if isinstance(body, bytes) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    front.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield front.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
