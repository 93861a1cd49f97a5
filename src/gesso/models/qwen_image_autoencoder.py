"""Qwen-Image's autoencoder, run for pictures: diffusers' network for videos, without what it keeps for later frames.

For a video, every convolution keeps what it saw for the frame that follows. A picture is a video of one frame, so that
is dropped: the same bits, in less than half of the memory. Tiles and slices are diffusers' as they are.
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

    def _encode(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1 or self.use_tiling:
            return super()._encode(x)  # pyright: ignore[reportReturnType]
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        if z.shape[2] > 1 or self.use_tiling:
            return super()._decode(z, return_dict)  # pyright: ignore[reportReturnType]
        image_B3FHW = self.decoder(self.post_quant_conv(z)).clamp(-1.0, 1.0)
        return DecoderOutput(sample=image_B3FHW) if return_dict else (image_B3FHW,)
