"""Clean latents of every training scene of the shapes world, stored in a run's folder and held in memory.

The world is finite (`worlds/shapes/every`), so that what a network should expect can be asked of all of it
(`posterior`). Not here: how files are written (`latents`), any expectation.
Shapes: S scenes, K those that a claim allows, B scenes asked for, C channels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gesso.training.latents import store, stored_digest
from gesso.training.pictures import to_tensor
from gesso.training.precision import autocast
from gesso.worlds import shapes
from gesso.worlds.shapes import Claim, Scene, every

LARGEST_SIDE = 128  # pixels: 4 GB of a KL autoencoder's latents


@dataclass(frozen=True, kw_only=True)
class EveryScene:
    """All training scenes of the shapes world, in the order of their numbers, as something to store.

    `identity` names the encoder's weights.
    """

    encode: Callable[[Tensor], Tensor]
    side: int
    identity: str
    columns: tuple[str, ...] = ("latent",)
    seed: int = 0

    def scenes(self, step: int, count: int) -> tuple[Tensor]:
        """Latents `[B,C,h,w]` of the `step`-th `count` scenes, fewer at the end."""
        numbers = every.training_numbers()[step * count : (step + 1) * count]
        pictures = shapes.draw([every.scene_at(int(number)) for number in numbers], self.side)
        with torch.no_grad():
            return (self.encode(to_tensor(pictures)).float(),)

    def digest(self) -> str:
        return stored_digest("shapes", self.side, self.seed, f"every scene, {self.identity}")


class WorldLatents:
    """Latents `[S,C,h,w]` of all training scenes by the order of their numbers, float16."""

    def __init__(self, latents_SChw: Tensor) -> None:
        self._latents_SChw = latents_SChw
        self._row_of = np.full(every.END, -1, np.int64)
        self._row_of[every.training_numbers()] = np.arange(len(latents_SChw))

    @classmethod
    def stored(cls, folder: Path, scenes: EveryScene, report: Callable[[int], None]) -> WorldLatents:
        """By the files of a run's folder; makes those that are missing. Raises FileError, RunError."""
        with autocast():
            stored = store(folder, scenes, len(every.training_numbers()), 1, report)
        return cls(torch.from_numpy(np.concatenate([shard["latent"] for shard in stored.shards])))

    def of(self, scenes: Sequence[Scene]) -> Tensor:
        """Clean latents `[B,C,h,w]` of training scenes, float32. Raises ValueError for any other."""
        rows = self._row_of[[every.number(scene) for scene in scenes]]
        if (rows < 0).any():
            raise ValueError("a scene is not of the training world")
        return self._latents_SChw[torch.from_numpy(rows)].float()

    def allowed(self, claim: Claim) -> tuple[Tensor, Tensor]:
        """Clean latents `[K,C,h,w]` of the training scenes of which a claim is true, and how often each is drawn among
        those, `[K]`; both float32."""
        numbers, shares = every.allowed(claim)
        rows = self._row_of[numbers]
        trained = rows >= 0
        share_K = torch.from_numpy(shares[trained]).float()
        return self._latents_SChw[torch.from_numpy(rows[trained])].float(), share_K / share_K.sum()
