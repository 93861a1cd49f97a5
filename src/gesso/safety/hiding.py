"""The blur of a flagged picture. Not here: when a picture is blurred (`engine/safety`)."""

from __future__ import annotations

from PIL import Image

PATCHES = 6
"""Mean colours that are left along the longer edge, whatever the size."""


def hidden(picture: Image.Image) -> Image.Image:
    """The picture, RGB of the same size, made of at most 6 x 6 mean colours and nothing else.

    A Gaussian of any width can be undone in part; here the rest of the picture is gone. It is computed in whole
    numbers, so that the same picture gives the same pixels on every machine.
    """
    longer = max(picture.size)
    width, height = (max(1, round(PATCHES * side / longer)) for side in picture.size)
    means = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
    return means.resize(picture.size, Image.Resampling.BICUBIC)
