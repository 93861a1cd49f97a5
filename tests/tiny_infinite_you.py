"""InfiniteYou as a guest of the tiny FLUX, with random weights: its networks, the pipeline, and its published folder.

Faces are found by a made-up detector in real onnxruntime, in the one picture that it finds any in; the recogniser is a
matrix. Not here: fixtures (the tests' own), the tiny FLUX itself (`tiny_flux`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso.identity.detection import FaceDetector
from gesso.identity.reader import FaceReader
from gesso.models import infusenet
from gesso.models.arcface import EDGE, EMBEDDING
from gesso.models.resampler import Resampler, ResamplerConfig
from gesso.pipelines.flux import FluxPipeline
from gesso.pipelines.infinite_you import InfiniteYou, Networks
from tests.tiny_flux import POOLED_WIDTH, TEXT_WIDTH, tiny_pipeline

PACK = Path(__file__).parent / "golden/data/infiniteyou"
PERSON = PACK / "fake_scrfd_image.png"
"""A picture with three faces, if the detector of `PACK` is asked."""
VARIANTS = ("aes_stage2", "sim_stage1")


def tiny_infusenet(variant: str = VARIANTS[0], *, guidance_embeds: bool = True) -> Any:
    torch.manual_seed(10 + VARIANTS.index(variant))
    network = infusenet.build(
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "pooled_projection_dim": POOLED_WIDTH,
            "axes_dims_rope": [4, 6, 6],
            "guidance_embeds": guidance_embeds,
        }
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("controlnet_"):  # which begin at zero
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def tiny_resampler() -> Resampler:
    torch.manual_seed(20)
    config = ResamplerConfig(dim=64, depth=1, dim_head=64, heads=1, output_dim=TEXT_WIDTH, ff_mult=2)
    return Resampler(config).eval().requires_grad_(False)


class TinyRecogniser(nn.Module):
    """Unit vectors of faces, by a matrix of every fourteenth pixel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(30)
        self.matrix = nn.Parameter(torch.randn(3 * (EDGE // 14) ** 2, EMBEDDING, generator=generator))

    def forward(self, face_B3HW: Tensor) -> Tensor:
        return nn.functional.normalize(face_B3HW[..., ::14, ::14].flatten(1) @ self.matrix, dim=1)


def tiny_faces() -> FaceReader:
    return FaceReader(FaceDetector(PACK), TinyRecogniser)


def tiny_guest(loaded: list[str] | None = None) -> InfiniteYou:
    """The guest; the variants that it loads are noted in `loaded`."""

    def load(variant: str) -> Networks:
        if loaded is not None:
            loaded.append(variant)
        return Networks(variant, tiny_infusenet(variant), tiny_resampler())

    cpu = torch.device("cpu")
    return InfiniteYou(faces=tiny_faces(), load=load, shapes=tiny_infusenet, device=cpu, dtype=torch.float32)


def tiny_pipeline_with_guest(loaded: list[str] | None = None) -> FluxPipeline:
    """The tiny FLUX of dev's kind with a guest."""
    return tiny_pipeline(guest=tiny_guest(loaded))


def write_tiny_infinite_you(folder: Path) -> Path:
    """Both variants as they are published, without recogniser and pack."""
    for variant in VARIANTS:
        place = folder / "infu_flux_v1.0" / variant
        tiny_infusenet(variant).save_pretrained(place / "InfuseNetModel", max_shard_size="20KB")
        torch.save({"image_proj": tiny_resampler().state_dict()}, place / "image_proj_model.bin")
    return folder
