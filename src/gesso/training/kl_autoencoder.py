"""The task of training a small KL autoencoder on a world's pictures, for nano flow models to work in its latents.

Four pixels a latent cell, two cells a token: FLUX and S3-DiT take 2 x 2 cells for a token, so 64 pixels are 64 tokens
of 8 x 8 pixels, as many as the finest scale of `infinity-nano`. Stride 8 would leave 16 tokens, each of which must
hold a whole outline; stride 2 would make 256, four times the work. Few channels: a flow model learns them all.
Not here: the loop, the network (`models/kl_autoencoder`), the flow model (`flow`).
Shapes: as in `models/kl_autoencoder`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.errors import RequestError
from gesso.models.kl_autoencoder import KLAutoencoderConfig, build, moments
from gesso.training.autoencoder import psnr
from gesso.training.export import save_model
from gesso.training.pictures import World, held_out_scenes, scenes_of_step, sheet
from gesso.training.settings import MOST_SCENES, check
from gesso.weights import flow_nano
from gesso.weights.files import fill

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_CHUNK = 64  # pictures at once where nothing is learned


@dataclass(frozen=True, kw_only=True)
class KLAutoencoderSettings:
    """Weights are those of the loss's terms.

    `kl_weight` is about what the latent's noise may cost in mean absolute error, for the term is a mean over latents.
    `measured` training scenes give the shift and the scale that are written into the model. `start_from` is an exported
    autoencoder (or a model with one) of the same sizes to go on from, "" for none.
    """

    network: KLAutoencoderConfig
    world: World = "shapes"
    start_from: str = ""
    side: int
    squared_weight: float = 0.5
    edge_weight: float = 0.0
    kl_weight: float = 3e-3
    held_out: int = 256
    measured: int = 4096

    def __post_init__(self) -> None:
        stride = 2 * self.network.stride  # of a token
        if self.side < 8 or self.side % stride:
            raise RequestError("side", self.side, f"a multiple of {stride} pixels, from 8")
        for name in ("squared_weight", "edge_weight", "kl_weight"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value >= 0, "a number from 0")
        for name in ("held_out", "measured"):
            value = getattr(self, name)
            check(name, value, 1 <= value <= MOST_SCENES, f"from 1 to {MOST_SCENES}")


class KLAutoencoderTask:
    """Reconstruct pictures through a latent with noise."""

    network: AutoencoderKL

    def __init__(self, settings: KLAutoencoderSettings, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.network = build(settings.network)
        if settings.start_from:
            self._go_on_from(Path(settings.start_from).expanduser())

    def heavy_modules(self) -> list[nn.Module]:
        return [self.network.encoder, self.network.decoder]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + squared error (edges weighted, if asked), and the posterior's divergence from the unit normal."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        image, _ = scenes_of_step(step, self.batch, settings.side, self.seed, settings.world)
        mean, log_variance = (part.float() for part in moments(self.network, image))
        latent = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        error = self.network.decoder(latent).float() - image
        pixels = error.abs() + settings.squared_weight * error.square()
        if settings.edge_weight:
            pixels = pixels * edge_weights(image, settings.edge_weight)
        pixels = pixels.mean()
        divergence = divergence_from_normal(mean, log_variance)
        figures = {"pixels": pixels.detach(), "divergence": divergence.detach()}
        return pixels + settings.kl_weight * divergence, figures

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on held-out scenes, from the posterior's mean and from a sample; its divergence in nats."""
        image, _ = held_out_scenes(self.settings.held_out, self.settings.side, self.settings.world)
        mean, log_variance = self._moments(image)
        return {
            "psnr": psnr(self._decoded(mean), image),
            "psnr_sampled": psnr(self._decoded(_sampled(mean, log_variance)), image),
            "divergence": float(divergence_from_normal(mean, log_variance)),
        }

    def samples(self) -> Image.Image:
        """Rows of three scenes, each as it is, from the posterior's mean, and from a sample."""
        image, _ = held_out_scenes(24, self.settings.side, self.settings.world)
        mean, log_variance = self._moments(image)
        columns = (image, self._decoded(mean), self._decoded(_sampled(mean, log_variance)))
        return sheet([[column[i + k] for i in range(3) for column in columns] for k in range(0, len(image), 3)])

    @torch.no_grad()
    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        self.network.eval()
        shift, scale = self.measure()
        config = replace(self.settings.network, shift_factor=shift, scaling_factor=scale)
        save_model(
            folder,
            {"autoencoder": self.network.state_dict()},
            {"family": "kl-autoencoder", "network": asdict(config)},
            facts,
        )

    def measure(self) -> tuple[float, float]:
        """Shift and scale that bring latents of training scenes to mean 0 and standard deviation 1."""
        count, total, squares = 0, 0.0, 0.0
        for first in range(0, self.settings.measured, _CHUNK):
            image, _ = scenes_of_step(first // _CHUNK, _CHUNK, self.settings.side, self.seed, self.settings.world)
            latent = self._moments(image[: self.settings.measured - first])[0].double()
            count += latent.numel()
            total += float(latent.sum())
            squares += float(latent.square().sum())
        mean = total / count
        deviation = math.sqrt(max(squares / count - mean * mean, 1e-12))
        return mean, 1 / deviation

    def _go_on_from(self, folder: Path) -> None:
        """Take the weights of an exported autoencoder. Raises FileError, WeightsError where its sizes differ."""
        theirs, _ = flow_nano.load_autoencoder(folder)
        fill(self.network, {name: value.clone() for name, value in theirs.state_dict().items()}, folder)

    def _moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        parts = [moments(self.network, chunk) for chunk in image.split(_CHUNK)]
        mean, log_variance = (torch.cat(part).float() for part in zip(*parts, strict=True))
        return mean, log_variance

    def _decoded(self, latent: Tensor) -> Tensor:
        return torch.cat([self.network.decoder(chunk) for chunk in latent.split(_CHUNK)])


def divergence_from_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a diagonal normal from the unit normal, mean over all numbers, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def edge_weights(image: Tensor, weight: float) -> Tensor:
    """Weights `[B,1,H,W]` of mean 1 a picture: 1 on flat ground, 1 + `weight` across the sharpest of edges."""
    highest = F.max_pool2d(image, 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-image, 3, stride=1, padding=1)
    weights = 1 + weight * (highest - lowest).amax(dim=1, keepdim=True) / 2
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def _sampled(mean: Tensor, log_variance: Tensor) -> Tensor:
    """One sample of each posterior, the same at every call."""
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
