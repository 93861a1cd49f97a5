"""Features of pictures that are edited, as Z-Image reads them: a SigLIP 2 vision network, through transformers.

Not here: files (`weights/z_image`), the latents of the same pictures.
Shapes: h w places of a picture, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class SiglipPictures:
    """Pictures to features `[h,w,E]` float32; sizes are as near to the picture's as the network's places allow."""

    def __init__(self, network: nn.Module, processor: Any) -> None:
        self.network = network
        self._processor = processor

    @property
    def max_tokens(self) -> int:
        """The most places of a picture."""
        return self._processor.max_num_patches

    @property
    def width(self) -> int:
        """E."""
        config: Any = self.network.config
        return config.hidden_size

    @torch.no_grad()
    def features(self, image: Image.Image) -> Tensor:
        """Of one picture, without the padding that the network wants."""
        parameter = next(self.network.parameters())
        given = self._processor(images=[image], return_tensors="pt").to(parameter.device)
        given["pixel_values"] = given["pixel_values"].to(parameter.dtype)
        height, width = given["spatial_shapes"][0].tolist()
        features_1NE = self.network(**given).last_hidden_state
        return features_1NE[0, : height * width].float().unflatten(0, (height, width))
