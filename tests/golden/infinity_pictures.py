"""Infinity goldens of kind j: the training image transform. The streaming order of the same kind is not yet here."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from gesso.pictures import cover_crop
from gesso.training.pictures import to_tensor
from tests.golden.comparison import Comparison
from tests.golden.side_car import Golden, NotYetError, SideCar, read_cases


class PictureCase(SideCar):
    input_hw: tuple[int, int]
    target_hw: tuple[int, int]


def check_pictures(golden: Golden, comparison: Comparison) -> None:
    """Kind j: covering resize, centre crop, and the scaling to [-1,1]."""
    if "transform" not in golden.kind:
        raise NotYetError("the streaming order of training data")
    pixels = golden.tolerances.get("uint8", default=1)
    for prefix, case in read_cases(golden, PictureCase, "input_u8"):
        before = golden.tensor(f"{prefix}.input_u8")
        comparison.true(f"{prefix}.input_hw", tuple(before.shape[:2]) == case.input_hw, f"{tuple(before.shape)}")
        height, width = case.target_hw
        after = np.array(cover_crop(Image.fromarray(before.numpy()), width, height))
        expected = golden.tensor(f"{prefix}.output_u8")
        comparison.close(f"{prefix}.output_u8", torch.from_numpy(after).movedim(-1, 0), expected, pixels)
        for name, recorded in golden.tensors.items():
            if name.startswith(f"{prefix}.output_first"):
                rows = to_tensor(after[None])[0, :, : recorded.shape[1]]
                comparison.close(name, rows, recorded, pixels * 2 / 255 + 1e-6)
