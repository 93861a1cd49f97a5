"""Scenes as a flow model learns from them: latents and token ids, drawn fresh each step or stored once in the run.

Drawing and encoding a batch costs a part of each step; storing costs it once, and then the same scenes come again in
another order each time round. Stored latents lie in the run's folder as files of some thousand scenes, each written
aside and renamed: a run that was killed makes only those that are missing. They are named after a digest of all that
they depend on, so a change of it makes them anew. Not here: the encoders, the loss (`flow`).
Shapes: B scenes, C h w a latent, T tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gesso.files import ready_folder, written_aside
from gesso.training.pictures import World, scenes_of_step

FOLDER = "latents"
SHARD = 4096  # scenes a file
_CHUNK = 64  # scenes encoded at once
# Of what is stored; another one when scenes or captions change.
_EDITIONS: dict[World, object] = {"shapes": 1, "faces": "faces 1"}


class Scenes(Protocol):
    """What is stored: named tensors of scenes, floating ones as float16, whole numbers as int16."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def seed(self) -> int: ...

    def scenes(self, step: int, count: int) -> tuple[Tensor, ...]:
        """The columns of one step's fresh scenes, in order."""
        ...

    def digest(self) -> str:
        """Of all that they depend on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How scenes become latents `[B,C,h,w]` and token ids `[B,T]`. `identity` names the encoders' weights."""

    encode: Callable[[Tensor], Tensor]
    token_ids: Callable[[list[str]], Tensor]
    side: int
    seed: int
    identity: str
    world: World = "shapes"
    columns: tuple[str, ...] = ("latent", "ids")

    def scenes(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Latents and token ids of one step's fresh scenes."""
        image, captions = scenes_of_step(step, count, self.side, self.seed, self.world)
        with torch.no_grad():
            return self.encode(image).float(), self.token_ids(captions)

    def digest(self) -> str:
        return stored_digest(self.world, self.side, self.seed, self.identity)


def stored_digest(world: World, side: int, seed: int, identity: str) -> str:
    """A name for stored scenes of a world; `identity` says what else they depend on."""
    values = [_EDITIONS[world], SHARD, _CHUNK, side, seed, identity]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Latents(Protocol):
    """Where a step's batch comes from."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The columns, float32 and int64: first latents `[B,C,h,w]` and token ids `[B,T]`; by the step alone."""
        ...


class FreshLatents:
    """Scenes that no step has seen before."""

    def __init__(self, encoding: Scenes, batch: int) -> None:
        self.encoding, self.size = encoding, batch

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.encoding.scenes(step, self.size)


class Rounds:
    """Which of `count` things each step takes: all of them, in a new order each time round; by the step alone."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.size, self.seed = count, batch, seed
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def of(self, step: int) -> list[int]:
        first = step * self.size
        places = [divmod(place, self.count) for place in range(first, first + self.size)]
        return [int(self._order(round_)[place]) for round_, place in places]

    def _draw_order(self, round_: int) -> np.ndarray:
        (seed,) = np.random.SeedSequence((self.seed, round_)).generate_state(1)  # PyTorch heeds its last 32 bits only
        generator = torch.Generator().manual_seed(int(seed))
        return torch.randperm(self.count, generator=generator).numpy()


class StoredLatents:
    """`count` scenes, in a new order each time round; memory-mapped float16."""

    def __init__(self, shards: list[np.ndarray], count: int, batch: int, seed: int) -> None:
        self.shards, self.rounds = shards, Rounds(count, batch, seed)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        picked = [divmod(scene, SHARD) for scene in self.rounds.of(step)]
        rows = np.stack([self.shards[shard][row] for shard, row in picked])
        wide = {np.dtype(np.float16): np.float32, np.dtype(np.int16): np.int64}
        columns = (rows[name] for name in rows.dtype.names or ())
        return tuple(torch.from_numpy(column.astype(wide[column.dtype])) for column in columns)


def store(
    folder: Path, encoding: Scenes, count: int, batch: int, report: Callable[[int], None] = lambda made: None
) -> StoredLatents:
    """Open a run's stored latents of `count` scenes, making what is missing of them; `report` hears how many are there.

    Raises FileError where the folder cannot be written to, RunError on a full disk.
    """
    room = ready_folder(ready_folder(folder / FOLDER) / encoding.digest())
    for other in (folder / FOLDER).iterdir():
        if other != room:
            shutil.rmtree(other, ignore_errors=True)
    for left in room.glob(".gesso-*"):  # of runs that were killed while writing
        left.unlink(missing_ok=True)
    shards = []
    for first in range(0, count, SHARD):
        size = min(SHARD, count - first)
        path = room / f"{first:08d}-{size}.npy"
        shard = _opened(path, size, encoding.columns)
        if shard is None:
            _write(path, encoding, first, size)
            shard = np.load(path, mmap_mode="r")
        shards.append(shard)
        report(first + size)
    return StoredLatents(shards, count, batch, encoding.seed)


def _opened(path: Path, size: int, columns: tuple[str, ...]) -> np.ndarray | None:
    """A finished file, None where there is none or it is damaged."""
    try:
        shard = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return shard if shard.shape == (size,) and shard.dtype.names == columns else None


def _write(path: Path, encoding: Scenes, first: int, size: int) -> None:
    rows: np.ndarray | None = None
    for done in range(0, size, _CHUNK):
        columns = dict(zip(encoding.columns, encoding.scenes((first + done) // _CHUNK, _CHUNK), strict=True))
        kept = slice(done, min(done + _CHUNK, size))
        if rows is None:
            kinds = [
                (name, np.float16 if column.is_floating_point() else np.int16, tuple(column.shape[1:]))
                for name, column in columns.items()
            ]
            rows = np.empty(size, dtype=kinds)
        for name, column in columns.items():
            rows[name][kept] = column.numpy()[: kept.stop - done]
    assert rows is not None
    content = io.BytesIO()  # numpy's own writing to a file hides what went wrong with the disk
    np.save(content, rows)
    with written_aside(path) as aside:
        aside.write_bytes(content.getbuffer())
