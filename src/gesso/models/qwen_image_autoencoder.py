"""Qwen-Image's autoencoder, run for pictures: diffusers' network for videos, without what it keeps for later frames.

For a video, every convolution keeps what it saw for the frame that follows. A picture is a video of one frame, so that
is dropped: the same bits, in less than half of the memory, whole or in tiles. Tiles and slices are diffusers' own.
Not here: the network (diffusers), the scale of latents (`pipelines/qwen_image`).
Shapes: B pictures, Z latent channels, H W pixels, h w latent cells, F frames.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor


class PictureAutoencoder(AutoencoderKLQwenImage):
    """Pictures `[B,3,1,H,W]` to a posterior over `[B,Z,1,h,w]` and back; by diffusers' own way where there is more.

    Takes diffusers' place under its public `encode` and `decode`.
    """

    _keeps = False

    def clear_cache(self) -> None:
        """Called before each picture, tile or video: lays out what its convolutions keep, if they keep anything."""
        super().clear_cache()
        if not self._keeps:
            self._feat_map = self._enc_feat_map = None

    def _encode(self, x: Tensor) -> Tensor:
        self._keeps = x.shape[2] > 1
        return super()._encode(x)  # pyright: ignore[reportReturnType]

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        self._keeps = z.shape[2] > 1
        return super()._decode(z, return_dict)  # pyright: ignore[reportReturnType]
