"""The task of training a BSQ autoencoder on a world's pictures.

The quantizer's sum is decoded after a random number of scales in half of the batches, so that a picture takes shape
scale by scale and partial sums can be shown as previews. Not here: the loop, the network, the quantizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.models.infinity.autoencoder import Autoencoder, AutoencoderConfig
from gesso.models.infinity.quantizer import codes, enlarge, quantize, sum_of_codes
from gesso.models.infinity.scales import Grid
from gesso.training.export import save_model
from gesso.training.pictures import held_out_scenes, scenes_of_step, sheet
from gesso.training.settings import MOST_SCENES, check


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """`grids` are the quantizer's, coarse to fine; weights are those of the loss's terms."""

    network: AutoencoderConfig
    grids: tuple[Grid, ...]
    side: int
    squared_weight: float = 0.5
    commitment_weight: float = 0.2
    partial_share: float = 0.25
    held_out: int = 256

    def __post_init__(self) -> None:
        check("side", self.side, self.side >= 1, "at least 1")
        check("grids", self.grids, len(self.grids) >= 1, "at least one grid")
        for name in ("squared_weight", "commitment_weight"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value >= 0, "a number from 0")
        check("partial_share", self.partial_share, 0 <= self.partial_share <= 1, "from 0 to 1")
        check("held_out", self.held_out, 1 <= self.held_out <= MOST_SCENES, f"from 1 to {MOST_SCENES}")


class AutoencoderTask:
    """Reconstruct pictures through the bits of all scales."""

    def __init__(self, settings: AutoencoderSettings, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.network = Autoencoder(settings.network)

    def heavy_modules(self) -> list[nn.Module]:
        return [self.network.encoder, self.network.decoder]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + squared error of the reconstruction, commitment of the encoder to its codes."""
        settings = self.settings
        image, _ = scenes_of_step(step, self.batch, settings.side, self.seed)
        latent = self.network.encode(image).float()
        quantized = quantize(latent, settings.grids)
        kept = self._scales_kept(step)
        sum_ = quantized.sum_BKHW
        if kept < len(settings.grids):
            tail = [enlarge(codes(bits), settings.grids[-1]) for bits in quantized.bits[kept:]]
            sum_ = sum_ - torch.stack(tail).sum(0)
        error = self.network.decoder(sum_).float() - image
        commitment = F.mse_loss(latent, quantized.sum_BKHW.detach())
        pixels = error.abs().mean() + settings.squared_weight * error.square().mean()
        loss = pixels + settings.commitment_weight * commitment
        figures = {"pixels": pixels.detach(), "commitment": commitment.detach()}
        return loss, figures

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on held-out scenes, with all scales and after each scale."""
        image, _ = held_out_scenes(self.settings.held_out, self.settings.side)
        bits = quantize(self.network.encode(image), self.settings.grids).bits
        figures = {}
        for kept in range(1, len(bits) + 1):
            decoded = self.network.decode(sum_of_codes(bits[:kept], self.settings.grids[-1]))
            figures[f"psnr_{kept:02d}"] = psnr(decoded, image)
        return {"psnr": figures[f"psnr_{len(bits):02d}"], **figures}

    def samples(self) -> Image.Image:
        """Rows: the truth, then the picture after each scale."""
        image, _ = held_out_scenes(12, self.settings.side)
        bits = quantize(self.network.encode(image), self.settings.grids).bits
        steps = [
            self.network.decode(sum_of_codes(bits[:kept], self.settings.grids[-1])) for kept in range(1, len(bits) + 1)
        ]
        return sheet([[image[i], *(decoded[i] for decoded in steps)] for i in range(len(image))])

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        config = {"family": "infinity-tokenizer", "network": asdict(self.settings.network)}
        save_model(folder, {"tokenizer": self.network.state_dict()}, config | {"grids": self.settings.grids}, facts)

    def _scales_kept(self, step: int) -> int:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        scales = len(self.settings.grids)
        if torch.rand((), generator=generator).item() >= self.settings.partial_share:
            return scales
        return int(torch.randint(1, scales + 1, (), generator=generator).item())


def psnr(decoded: Tensor, image: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; pixels in [-1,1]."""
    squared_B = (decoded.float() - image).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / squared_B.clamp_min(1e-12))).mean())
