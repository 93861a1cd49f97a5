"""Stored latents: every scene once a round, made once, mended where they are damaged, safe when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gesso.errors import FileError
from gesso.training import latents
from gesso.training.latents import Encoding, FreshLatents, StoredLatents
from gesso.training.pictures import scenes_of_step

COUNT, BATCH = 11, 4


def encoding(identity: str = "pooled", seed: int = 0) -> Encoding:
    """Latents are pooled pictures, token ids the captions' lengths."""
    return Encoding(
        encode=lambda image: F.avg_pool2d(image, 4),
        token_ids=lambda captions: torch.tensor([[len(caption), 2] for caption in captions]),
        side=16,
        seed=seed,
        identity=identity,
    )


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 4)
    monkeypatch.setattr(latents, "_CHUNK", 2)


def _store(folder: Path, encoding: Encoding, made: list[int] | None = None) -> StoredLatents:
    return latents.store(folder, encoding, COUNT, BATCH, (made if made is not None else []).append)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


def test_every_scene_comes_once_a_round(tmp_path: Path) -> None:
    stored = _store(tmp_path, encoding())
    batches = [stored.batch(step) for step in range(COUNT)]  # BATCH rounds
    assert all(latent.shape == (BATCH, 3, 4, 4) and ids.shape == (BATCH, 2) for latent, ids in batches)
    assert all(latent.dtype == torch.float32 and ids.dtype == torch.int64 for latent, ids in batches)
    rows = torch.cat([latent for latent, _ in batches]).flatten(1)
    image, _ = scenes_of_step(0, COUNT, 16, 0)
    wanted = F.avg_pool2d(image, 4).flatten(1)
    orders = [torch.cdist(rows[first : first + COUNT], wanted).argmin(dim=1) for first in range(0, len(rows), COUNT)]
    assert all(order.sort().values.tolist() == list(range(COUNT)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == BATCH
    torch.testing.assert_close(rows[:COUNT], wanted[orders[0]], rtol=1e-3, atol=1e-3)


def test_a_batch_is_a_function_of_its_step(tmp_path: Path) -> None:
    one, again = _store(tmp_path / "one", encoding()), _store(tmp_path / "two", encoding())
    again.batch(7)
    assert all(torch.equal(*pair) for pair in zip(one.batch(3), again.batch(3), strict=True))


def test_captions_stay_with_their_pictures(tmp_path: Path) -> None:
    image, captions = scenes_of_step(0, COUNT, 16, 0)
    latent, ids = _store(tmp_path, encoding()).batch(1)
    nearest = torch.cdist(latent.flatten(1), F.avg_pool2d(image, 4).flatten(1)).argmin(dim=1)
    assert ids[:, 0].tolist() == [len(captions[index]) for index in nearest]


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []
    _store(tmp_path, encoding(), made)
    assert made == [4, 8, 11]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    _store(tmp_path, encoding())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY half", b"something else"], ids=str)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: bytes) -> None:
    _store(tmp_path, encoding())
    before = _files(tmp_path)
    next(tmp_path.rglob("00000004-4.npy")).write_bytes(damage)
    _store(tmp_path, encoding())
    assert _files(tmp_path) == before


def test_other_settings_make_all_anew(tmp_path: Path) -> None:
    _store(tmp_path, encoding())
    before = _files(tmp_path)
    _store(tmp_path, encoding(identity="other"))
    after = _files(tmp_path)
    assert len(after) == len(before)
    assert not after.keys() & before.keys()
    _store(tmp_path, encoding(identity="other", seed=1))
    assert not _files(tmp_path).keys() & after.keys()


def test_more_scenes_keep_the_whole_files(tmp_path: Path) -> None:
    _store(tmp_path, encoding())
    kept = next(tmp_path.rglob("00000004-4.npy"))
    before = kept.stat().st_mtime_ns
    made: list[int] = []
    latents.store(tmp_path, encoding(), 16, BATCH, made.append)
    assert made == [4, 8, 12, 16]
    assert kept.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / latents.FOLDER).write_text("a file")
    with pytest.raises(FileError, match="cannot be written to"):
        _store(tmp_path, encoding())


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
sys.path.insert(0, sys.argv[1])
from gesso.training import latents
from tests.unit.training.test_latents import BATCH, COUNT, encoding
latents.SHARD, latents._CHUNK = 4, 2
write, calls = Path.write_bytes, []
def half(path, content):
    calls.append(path)
    write(path, content[: len(content) // 2] if len(calls) == 2 else content)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
with patch.object(Path, "write_bytes", half):
    latents.store(Path(sys.argv[2]), encoding(), COUNT, BATCH)
"""


def test_being_killed_half_way_through_a_file(tmp_path: Path) -> None:
    """What was finished stays, what was half-written goes, and the rest is made as if nothing had been."""
    _store(tmp_path / "undisturbed", encoding())
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "killed").mkdir()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list((tmp_path / "killed").rglob(".gesso-*"))) == 1
    finished = next((tmp_path / "killed").rglob("00000000-4.npy"))
    before = finished.stat().st_mtime_ns
    _store(tmp_path / "killed", encoding())
    assert finished.stat().st_mtime_ns == before
    assert _files(tmp_path / "killed") == _files(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob(".gesso-*"))


def test_fresh_scenes_never_come_again() -> None:
    fresh = FreshLatents(encoding(), BATCH)
    batches = [fresh.batch(step)[0] for step in range(3)]
    assert torch.equal(batches[1], fresh.batch(1)[0])
    assert not torch.equal(batches[0], batches[1])
