"""Pulls that are ended, pulls at once, and removing: by processes, threads and the command line."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from gesso.errors import FileError, RequestError, RunError
from gesso.weights import catalogue, hub
from gesso.weights.hub import Pulled
from tests.hub_server import Hub, wait_until
from tests.unit.cli.running import call, spawn
from tests.unit.weights.pulling import (
    LARGE,
    MODEL,
    SIZE,
    Silent,
    expected,
    files,
    folder,
    grown,
    pull,
)

pytestmark = pytest.mark.usefixtures("own_place")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_is_ended_is_finished_by_the_next(loopback: Hub, tmp_path: Path, ending: signal.Signals) -> None:
    loopback.pause = 0.1
    process = spawn("models", "pull", MODEL, folder=tmp_path)
    wait_until(lambda: grown() > 200_000)
    before = time.monotonic()
    process.send_signal(ending)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - before < 10
    assert out == ""
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert "what has come is kept" in err
        assert "Traceback" not in err
    assert LARGE not in files()
    kept, loopback.pause = grown(), 0.0
    wait_until(lambda: any(LARGE in asked.path for asked in loopback.asked))  # the hub has seen that nobody listens
    already = loopback.sent(LARGE)
    assert kept > 200_000
    pull()
    assert loopback.sent(LARGE) - already == SIZE - kept
    assert files()[LARGE] == expected()[LARGE]


def test_two_pulls_at_once(loopback: Hub) -> None:
    loopback.pause = 0.02
    results: list[Pulled] = []
    second = Silent()
    threads = [threading.Thread(target=lambda: results.append(pull()))]
    threads.append(threading.Thread(target=lambda: results.append(pull(watcher=second))))
    threads[0].start()
    wait_until(lambda: grown() > 0)
    threads[1].start()
    wait_until(second.waited.is_set)
    with pytest.raises(RunError, match="is being pulled"):
        hub.remove(catalogue.find(MODEL))
    for thread in threads:
        thread.join()
    assert sorted(pulled.fetched > 0 for pulled in results) == [False, True]
    assert loopback.sent(LARGE) == SIZE
    assert files()[LARGE] == expected()[LARGE]


def test_removing(loopback: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not here"):
        hub.removable(catalogue.find(MODEL))
    pull()
    size = sum(map(len, files().values()))
    assert hub.remove(catalogue.find(MODEL)) == size
    assert not folder().exists()
    with pytest.raises(RequestError, match="ships with gesso"):
        hub.remove(catalogue.find("infinity-nano"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder().symlink_to(outside)
    for refused in (lambda: hub.remove(catalogue.find(MODEL)), pull):
        with pytest.raises(FileError):
            refused()
    assert (outside / "mine").read_text() == "mine"


def test_by_the_command_line(capsys: pytest.CaptureFixture[str], loopback: Hub) -> None:
    outcome = call(capsys, "generate", "a star", "--model", MODEL)
    assert outcome.status == 3
    assert outcome.error.endswith(f"get it with: gesso models pull {MODEL}")
    outcome = call(capsys, "models", "pull", MODEL, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    line = json.loads(outcome.out)
    assert (line["name"], line["from"], line["files"]) == (MODEL, "huggingface", len(expected()))
    again = call(capsys, "models", "pull", MODEL, "--from", "modelscope")
    assert "all whole" in again.out
    assert again.err.splitlines()[-1] == f"{MODEL}: 1 MB"
    assert "all whole" in call(capsys, "models", "verify", MODEL).out
    (folder() / LARGE).write_bytes(bytes(SIZE))
    assert call(capsys, "models", "verify", MODEL).out == f"altered: {LARGE}\n"
    assert "--yes would remove" in call(capsys, "models", "remove", MODEL).error
    assert folder().is_dir()
    assert "0.7 MB freed" in call(capsys, "models", "remove", MODEL, "--yes").out
    assert not folder().exists()
