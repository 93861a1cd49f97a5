"""What the shapes world itself would answer a flow network: the mean of all clean latents that a noisy one may be of.

The world is finite (`worlds/shapes/every`), so the expectation that a network learns from samples can be had without
any: over every training scene that a claim allows, weighed by how likely it makes the noisy latent. As a target it has
the least variance there is (arXiv:2302.00670 takes a batch for the world), and it says also what is right where no
noise leads from a true picture: on the network's own way.
Not here: noise, networks, the loss (`on_policy`); how latents are stored (`latents`).
Shapes: S scenes, K those that a claim allows, B noisy latents, C channels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gesso.devices import CPU
from gesso.training.latents import store, stored_digest
from gesso.training.pictures import to_tensor
from gesso.worlds import shapes
from gesso.worlds.shapes import Claim, Scene, every


@dataclass(frozen=True, kw_only=True)
class EveryScene:
    """All training scenes of the shapes world, in the order of their numbers, as something to store."""

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


class Posterior:
    """Clean latents of all training scenes (float16, 1 GB at 64 pixels), and the mean of those that fit."""

    def __init__(self, latents_SChw: Tensor) -> None:
        self.shape = latents_SChw.shape[1:]
        self._latents_SN = latents_SChw.flatten(1)
        self._row_of = np.full(every.END, -1, np.int64)
        self._row_of[every.training_numbers()] = np.arange(len(latents_SChw))

    @classmethod
    def of_world(cls, folder: Path, scenes: EveryScene, report: Callable[[int], None]) -> Posterior:
        """By latents that are stored in a run's folder; makes those that are missing. Raises FileError, RunError."""
        stored = store(folder, scenes, len(every.training_numbers()), 1, report)
        return cls(torch.from_numpy(np.concatenate([shard["latent"] for shard in stored.shards])))

    def latents(self, scenes: Sequence[Scene]) -> Tensor:
        """Clean latents `[B,C,h,w]` of training scenes, float32. Raises ValueError for any other."""
        rows = self._row_of[[every.number(scene) for scene in scenes]]
        if (rows < 0).any():
            raise ValueError("a scene is not of the training world")
        return self._latents_SN[torch.from_numpy(rows)].float().unflatten(1, self.shape)

    @torch.no_grad()
    def mean(self, noisy_BChw: Tensor, sigma_B: Tensor, claims: Sequence[Claim]) -> Tensor:
        """Expected clean latents `[B,C,h,w]` given the noisy ones and what is claimed of each. sigma is above 0, and
        every claim true of some training scene.

        A noisy latent is (1 - sigma) * clean + sigma * noise. Up to a constant, the logarithm of what a scene is worth
        is that of its share plus (1 - sigma) / sigma^2 <noisy, clean> - ((1 - sigma) / sigma)^2 |clean|^2 / 2.
        """
        rows = zip(noisy_BChw.flatten(1), sigma_B.tolist(), claims, strict=True)
        with torch.autocast(CPU, enabled=False):
            return torch.stack([self._mean(*row) for row in rows]).unflatten(1, self.shape)

    def _mean(self, noisy_N: Tensor, sigma: float, claim: Claim) -> Tensor:
        numbers, shares = every.allowed(claim)
        rows = self._row_of[numbers]
        trained = rows >= 0
        clean_KN = self._latents_SN[torch.from_numpy(rows[trained])].float()
        share_K = torch.from_numpy(shares[trained]).float()
        signal = (1 - sigma) / sigma
        fit_K = clean_KN @ noisy_N * (signal / sigma) - clean_KN.square().sum(1) * (signal**2 / 2)
        weight_K = torch.softmax(share_K.log() + fit_K, dim=0)
        likely = weight_K > 1e-7  # of thousands mostly a few
        return weight_K[likely] @ clean_KN[likely] / weight_K[likely].sum()
