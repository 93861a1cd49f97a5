"""HunyuanVideo's autoencoder, decoding tile by tile: a pause after each, and frames given out once they are final.

Tiles overlap in time, rows and columns and are blended into one another. Their sizes, strides and the blending are the
autoencoder's own; what is made is equal, bit for bit, to what its `decode` makes with `enable_tiling`. That keeps every
tile of a video; here two rows of tiles are kept, and the last stretch of frames.
Not here: what latents mean, pictures (`pipelines/hunyuan_video`).
Shapes: C latent channels, f h w latent frames, rows and columns, F H W those of pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo


class Axis(NamedTuple):
    """How one axis is cut. `size` and `stride` count latent cells; `shown` pixels of a tile are kept, `blend` mixed."""

    size: int
    stride: int
    shown: int
    blend: int


class Tiling(NamedTuple):
    """The axes of an autoencoder's tiles; of `time` the first tile has one frame more."""

    time: Axis
    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, autoencoder: AutoencoderKLHunyuanVideo) -> Tiling:
        """That which the autoencoder is set to."""
        part, cells, frames = autoencoder, autoencoder.spatial_compression_ratio, autoencoder.temporal_compression_ratio
        return cls(
            _axis(part.tile_sample_min_num_frames, part.tile_sample_stride_num_frames, frames),
            _axis(part.tile_sample_min_height, part.tile_sample_stride_height, cells),
            _axis(part.tile_sample_min_width, part.tile_sample_stride_width, cells),
        )

    def tiles(self, frames: int, height: int, width: int) -> Iterator[tuple[int, int, int]]:
        """Latent frames, rows and columns of every tile of so many, in the order in which they are decoded."""
        for frame in self.stretches(frames):
            deep = min(frames - frame, self.time.size + 1)
            whole = height <= self.rows.size and width <= self.columns.size
            for top in range(0, height, height if whole else self.rows.stride):
                for left in range(0, width, width if whole else self.columns.stride):
                    yield deep, min(height - top, self.rows.size), min(width - left, self.columns.size)

    def stretches(self, frames: int) -> range:
        """The first latent frame of each stretch of so many; the last frame alone would add nothing."""
        return range(1) if frames <= self.time.size else range(0, frames - 1, self.time.stride)


def _axis(size: int, stride: float, pixels: int) -> Axis:
    shown = int(stride)
    return Axis(size // pixels, shown // pixels, shown, size - shown)


def decode_in_tiles(autoencoder: AutoencoderKLHunyuanVideo, latent_1Cfhw: Tensor) -> Iterator[Tensor | None]:
    """Frames `[1,3,F,H,W]`, about [-1,1], in stretches that make the video together; None after every tile.

    `latent_1Cfhw` is unscaled, as `decode` of the autoencoder takes it. Mirrors `_temporal_tiled_decode`.
    """
    frames, tiling = latent_1Cfhw.shape[2], Tiling.of(autoencoder)
    time = tiling.time
    if frames <= time.size:
        yield (yield from _plane(autoencoder, latent_1Cfhw))
        return
    before: Tensor | None = None
    left = (frames - 1) * autoencoder.temporal_compression_ratio + 1
    for start in tiling.stretches(frames):
        decoded = yield from _plane(autoencoder, latent_1Cfhw[:, :, start : start + time.size + 1])
        if before is None:
            shown = decoded[:, :, : time.shown + 1]
        else:
            with torch.inference_mode():
                decoded = autoencoder.blend_t(before, decoded[:, :, 1:], time.blend)
            shown = decoded[:, :, : time.shown]
        yield shown[:, :, :left]
        left -= shown.shape[2]
        before = decoded


def _plane(autoencoder: AutoencoderKLHunyuanVideo, latent_1Cfhw: Tensor) -> Generator[None, None, Tensor]:
    """All rows and columns of a stretch of frames. Mirrors `tiled_decode`, and `_decode` of what is one tile."""
    _, _, _, height, width = latent_1Cfhw.shape
    _, rows, columns = Tiling.of(autoencoder)
    if height <= rows.size and width <= columns.size:
        whole = _decoded(autoencoder, latent_1Cfhw)
        yield
        return whole
    made: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, height, rows.stride):
        row: list[Tensor] = []
        for left in range(0, width, columns.stride):
            tile = latent_1Cfhw[..., top : top + rows.size, left : left + columns.size]
            row.append(_decoded(autoencoder, tile))
            yield
        made.append(_blended(autoencoder, row, above, rows, columns))
        above = row
    cells = autoencoder.spatial_compression_ratio
    with torch.inference_mode():
        return torch.cat(made, dim=3)[..., : height * cells, : width * cells]


@torch.inference_mode()
def _decoded(autoencoder: AutoencoderKLHunyuanVideo, tile_1Cfhw: Tensor) -> Tensor:
    return autoencoder.decoder(autoencoder.post_quant_conv(tile_1Cfhw))


@torch.inference_mode()
def _blended(
    autoencoder: AutoencoderKLHunyuanVideo, row: list[Tensor], above: list[Tensor], rows: Axis, columns: Axis
) -> Tensor:
    """A row of tiles as one: each is mixed, in place, with the one above it and then with the one before it."""
    shown = []
    for column, tile in enumerate(row):
        if above:
            tile = autoencoder.blend_v(above[column], tile, rows.blend)
        if column:
            tile = autoencoder.blend_h(row[column - 1], tile, columns.blend)
        shown.append(tile[..., : rows.shown, : columns.shown])
    return torch.cat(shown, dim=-1)
