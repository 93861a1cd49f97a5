"""Latents as patches and back, the padding of captions and pictures, and where every token stands.

Positions are (frame, row, column). Tokens of a caption follow each other on the frame axis from 1, padding included;
its picture comes after it. Padding of pictures stands at (0, 0, 0). Padding is made of tokens like any other: it is
attended to. Not here: in which order tokens of many samples lie (`layout`).
Source: Z-Image's published code; for editing, diffusers' `ZImageTransformer2DModel`, whose quirks are kept, since
weights are trained with them.
Shapes: C channels, F frames, h w latent cells, n tokens, P numbers in a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gesso.models.s3dit.config import PADDING

Size = tuple[int, int, int]
"""Frames, height and width of a latent, in cells."""
Grid = tuple[int, int]
"""Rows and columns of picture features."""


@dataclass(frozen=True, kw_only=True)
class ContextShape:
    """How much of everything a sample's context holds.

    `captions` are tokens of each piece of the caption, before padding; `conditions` sizes of the clean pictures that
    are edited; `features` the grids of features of these pictures, one each or none at all. Where `editing`, tokens
    have another order and other positions, even without conditions.
    """

    captions: tuple[int, ...]
    conditions: tuple[Size, ...] = ()
    features: tuple[Grid, ...] = ()
    editing: bool = False

    def __post_init__(self) -> None:
        if not self.captions or min(self.captions) < 1:
            raise ValueError("a caption must have at least one token")
        if not self.editing and (len(self.captions) != 1 or self.conditions or self.features):
            raise ValueError("a caption in pieces, conditions and features are for editing")
        if self.editing and len(self.captions) <= len(self.conditions):
            raise ValueError(f"{len(self.conditions)} conditions need a piece of the caption each, and one more")
        if self.features and len(self.features) != len(self.conditions):
            raise ValueError(f"{len(self.features)} grids of features for {len(self.conditions)} conditions")

    @property
    def feature_lengths(self) -> tuple[int, ...]:
        """Features of each picture before padding; the one that is made has none, which is padding all the same."""
        return (*(rows * columns for rows, columns in self.features), 0) if self.features else ()

    @property
    def caption_tokens(self) -> int:
        """Of all pieces, padding included."""
        return sum(padded(length) for length in self.captions)

    @property
    def feature_tokens(self) -> int:
        """Of all pictures, padding included."""
        return sum(padded(length) for length in self.feature_lengths)

    def starts(self) -> list[int]:
        """Frame at which each picture stands: the conditions, then the one that is made."""
        if not self.editing:
            return [padded(self.captions[0]) + 1]
        ends: list[int] = []
        position = 1
        for length in self.captions:
            position += length
            ends.append(position)
            position += 2  # a picture, and its features
        return ends[: len(self.conditions) + 1]


def padded(length: int) -> int:
    """The next multiple of 32, from 32 on."""
    return max(1, -(-length // PADDING)) * PADDING


def token_grid(size: Size, patch: tuple[int, int]) -> Size:
    """Patches along each axis. Raises ValueError for a size that patches do not divide."""
    frames, edge = patch
    if size[0] % frames or size[1] % edge or size[2] % edge or min(size) < 1:
        raise ValueError(f"a latent of {size} cells does not divide into patches of {frames} x {edge} x {edge}")
    return size[0] // frames, size[1] // edge, size[2] // edge


def token_count(size: Size, patch: tuple[int, int]) -> int:
    """Tokens of a latent before padding."""
    frames, rows, columns = token_grid(size, patch)
    return frames * rows * columns


def patchify(latent_CFhw: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches `[n,P]`, tokens in order of (frame, row, column); inside a patch the channel is fastest."""
    channels, *size = latent_CFhw.shape
    frames, rows, columns = token_grid((size[0], size[1], size[2]), patch)
    pieces = latent_CFhw.view(channels, frames, patch[0], rows, patch[1], columns, patch[1])
    return pieces.permute(1, 3, 5, 2, 4, 6, 0).reshape(frames * rows * columns, -1)


def unpatchify(patches_nP: Tensor, size: Size, patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`, `[C,F,h,w]`."""
    frames, rows, columns = token_grid(size, patch)
    pieces = patches_nP.view(frames, rows, columns, patch[0], patch[1], patch[1], -1)
    return pieces.permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, *size)


def caption_positions(shape: ContextShape) -> Tensor:
    """Positions `[n,3]` of a caption's tokens, padding included.

    In editing, the published code puts as many zeros after each padded piece as that piece has padding, and cuts what
    is too long: positions of later pieces are shifted against their tokens.
    """
    runs: list[Tensor] = []
    start = 1
    for length in shape.captions:
        frames = torch.arange(start, start + padded(length))
        runs += [frames, torch.zeros(padded(length) - length, dtype=frames.dtype)]
        start += length + 2
    frames_n = torch.cat(runs)[: shape.caption_tokens]
    return torch.stack((frames_n, torch.zeros_like(frames_n), torch.zeros_like(frames_n)), dim=-1)


def picture_positions(start: int, size: Size, patch: tuple[int, int]) -> Tensor:
    """Positions `[n,3]` of a picture's tokens, padding included, from frame `start`."""
    grid = token_grid(size, patch)
    frames, rows, columns = (torch.arange(count) for count in grid)
    positions_n3 = torch.cartesian_prod(frames + start, rows, columns)
    return _with_zeros(positions_n3)


def feature_positions(shape: ContextShape) -> Tensor:
    """Positions `[n,3]` of all features of a context, padding included: each grid spread over its picture's cells."""
    parts: list[Tensor] = []
    for start, (height, width), size in zip(shape.starts(), shape.features, shape.conditions, strict=False):
        rows = torch.arange(height, dtype=torch.float32) / max(height - 1, 1) * (size[1] - 1)
        columns = torch.arange(width, dtype=torch.float32) / max(width - 1, 1) * (size[2] - 1)
        positions_n2 = torch.cartesian_prod(rows, columns).long()
        frames_n1 = torch.full((len(positions_n2), 1), start + 1)
        parts.append(_with_zeros(torch.cat((frames_n1, positions_n2), dim=1)))
    return torch.cat((*parts, torch.zeros(PADDING, 3, dtype=torch.int64)))


def feature_rows(features_hwE: Tensor) -> Tensor:
    """Features as rows `[n,E]`. Channels come before places when they are cut into rows, as in the published code."""
    height, width, channels = features_hwE.shape
    return features_hwE.permute(2, 0, 1).reshape(height * width, channels)


def _with_zeros(positions_n3: Tensor) -> Tensor:
    missing = padded(len(positions_n3)) - len(positions_n3)
    return torch.cat((positions_n3, positions_n3.new_zeros(missing, 3)))
