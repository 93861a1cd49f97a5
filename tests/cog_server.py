"""Cog's own server over the predictor of `docker/sdxl`, in a process of its own, bounded in time.

Not here: models (`tiny_sdxl`) and what is asked (the tests').
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

PREDICTOR = Path(__file__).parents[1] / "docker" / "sdxl"
_STARTS_WITHIN = 90.0  # seconds
_PARTS = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


@contextmanager
def cog_server(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """The address of a server that is ready; `folder` takes its home and its log."""
    port = _free_port()
    environment = {name: os.environ[name] for name in _PARTS if name in os.environ}
    # The server starts its worker as plain "python": the one that runs this must come first.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {"HOME": str(folder), "GESSO_HOME": str(folder / "home"), "GESSO_DEVICE": "cpu"}
    environment |= {"OMP_NUM_THREADS": "1", "PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
    environment |= settings
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=PREDICTOR,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, folder / "log")
            yield address
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + _STARTS_WITHIN
    status = "no answer"
    while time.monotonic() < end and process.poll() is None:
        with suppress(httpx2.TransportError):
            status = httpx2.get(f"{address}/health-check", timeout=5).json()["status"]
        if status == "READY":
            return
        if status in ("SETUP_FAILED", "DEFUNCT"):
            break
        time.sleep(0.2)
    raise AssertionError(f"the server did not get ready ({status}):\n{log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then end it with all that it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
