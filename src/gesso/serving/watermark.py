"""SDXL's invisible watermark: 48 bits, again and again, in the blue-difference colour of a picture.

A picture's U channel (BT.601, 128 for grey) is halved by the Haar wavelet. Of every 4x4 block of it, the largest value
but the first is moved to a quarter or three quarters between multiples of 36: a zero or a one. As the library
invisible-watermark has it ("dwtDct"), with the bits that Stability AI's code writes; that library's exchange of the
wavelet's details and its other scale for floats, by which fewer bits survive, are left out. Not here: reading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BITS = tuple(int(bit) for bit in f"{0b101100111110110010010000011110111011000110011110:048b}")
_SCALE = 36.0
_BLOCK = 8  # pixels of a block's edge: two for each of its four values
_LUMA = (0.299, 0.587, 0.114)
_U_OF_BLUE = 0.492  # U = 0.492 (B - Y) + 128
_BLUE_OF_U, _GREEN_OF_U = 2.032, -0.395


def marked(picture: Image) -> Image:
    """The picture (RGB) with the watermark in it. What is beyond whole blocks of 8x8 pixels stays as it is."""
    from PIL import Image

    rgb_HW3 = np.asarray(picture, dtype=np.float32).copy()
    down, across = picture.height // _BLOCK, picture.width // _BLOCK
    inner_hw3 = rgb_HW3[: down * _BLOCK, : across * _BLOCK]
    u_hw = _U_OF_BLUE * (inner_hw3[..., 2] - inner_hw3 @ np.array(_LUMA, dtype=np.float32)) + 128
    half = u_hw.reshape(down * 4, 2, across * 4, 2).sum(axis=(1, 3)) / 2
    blocks_N16 = half.reshape(down, 4, across, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    rows, largest = np.arange(len(blocks_N16)), blocks_N16[:, 1:].argmax(axis=1) + 1
    values = blocks_N16[rows, largest]
    wanted = (values // _SCALE + 0.25 + 0.5 * np.resize(BITS, len(rows))) * _SCALE
    change_N16 = np.zeros_like(blocks_N16)
    change_N16[rows, largest] = wanted - values
    change = change_N16.reshape(down, across, 4, 4).transpose(0, 2, 1, 3).reshape(down * 4, across * 4)
    change_hw = change.repeat(2, axis=0).repeat(2, axis=1) / 2  # each value of the half is half the sum of four
    inner_hw3[..., 2] += _BLUE_OF_U * change_hw
    inner_hw3[..., 1] += _GREEN_OF_U * change_hw
    return Image.fromarray(rgb_HW3.round().clip(0, 255).astype(np.uint8))
