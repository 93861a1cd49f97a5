"""The linear preview: exact where the autoencoder is linear, best with diffusers' own, fitted once at first use."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.pipelines.latent_preview import LinearPreview, synthetic_pictures

MIX = torch.tensor([[0.9, 0.2, -0.1], [-0.3, 0.8, 0.4], [0.1, -0.5, 1.1], [0.3, 0.3, 0.3], [-0.2, 0.7, 0.0]])
SHIFT = torch.tensor([0.3, -1.0, 0.2, 0.0, 2.0])


def linear_encode(image_B3SS: Tensor, stride: int = 8) -> Tensor:
    """Five channels that mix the colours of a cell, and a constant each."""
    return torch.einsum("ck,bkhw->bchw", MIX, F.avg_pool2d(image_B3SS, stride)) + SHIFT[:, None, None]


def difference(preview: LinearPreview, latent_CHW: Tensor, colours_3HW: Tensor) -> float:
    """The most by which a preview at one pixel a cell is off, in 255ths."""
    shown = np.asarray(preview(latent_CHW).resize((colours_3HW.shape[2], colours_3HW.shape[1]), 0)).astype(float)
    wanted = (colours_3HW.permute(1, 2, 0).numpy() * 127.5 + 127.5).round()
    return float(np.abs(shown - wanted).max())


def test_a_linear_autoencoder_is_shown_exactly() -> None:
    preview = LinearPreview.fit(linear_encode, channels=5)
    cells_3HW = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent_CHW = torch.einsum("ck,khw->chw", MIX, cells_3HW) + SHIFT[:, None, None]
    assert preview.matrix.shape == (6, 3)
    shown = latent_CHW.permute(1, 2, 0) @ preview.matrix[:-1] + preview.matrix[-1]
    assert torch.allclose(shown.permute(2, 0, 1), cells_3HW, atol=1 / 255)


def test_cells_become_whole_numbers_of_pixels() -> None:
    preview = LinearPreview(linear_encode, channels=5)
    for cells, pixels in (((4, 6), (32, 48)), ((32, 32), (256, 256)), ((100, 50), (200, 100)), ((300, 20), (300, 20))):
        picture = preview(torch.zeros(5, *cells))
        assert (picture.mode, picture.size) == ("RGB", pixels[::-1])


def test_plain_colours_stay_plain() -> None:
    preview = LinearPreview(linear_encode, channels=5)
    for image_3SS in synthetic_pictures()[:27]:
        latent_CHW = linear_encode(image_3SS[None])[0]
        assert difference(preview, latent_CHW, F.avg_pool2d(image_3SS, 8)) <= 1


def test_it_is_fitted_once_and_at_first_use() -> None:
    calls: list[int] = []

    def counted(image_B3SS: Tensor) -> Tensor:
        calls.append(len(image_B3SS))
        return linear_encode(image_B3SS)

    preview = LinearPreview(counted, channels=5)
    assert calls == []
    preview(torch.zeros(5, 4, 4))
    assert sum(calls) == len(synthetic_pictures())
    preview(torch.ones(5, 4, 4))
    assert sum(calls) == len(synthetic_pictures())


def test_it_is_the_same_every_time_and_leaves_chance_alone() -> None:
    before = torch.get_rng_state()
    one, other = LinearPreview.fit(linear_encode, 5), LinearPreview.fit(linear_encode, 5)
    assert torch.equal(one.matrix, other.matrix)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_of_any_dtype_and_without_numbers_are_shown() -> None:
    preview = LinearPreview(linear_encode, channels=5)
    assert preview(torch.zeros(5, 4, 4, dtype=torch.bfloat16)).mode == "RGB"
    assert preview(torch.full((5, 4, 4), torch.nan)).getpixel((0, 0)) == (128, 128, 128)
    latent_CHW = torch.ones(5, 4, 4)
    preview(latent_CHW)
    assert torch.equal(latent_CHW, torch.ones(5, 4, 4))


def test_with_diffusers_own_autoencoder_no_linear_map_is_better() -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(8, 8, 8),  # pyright: ignore[reportArgumentType]
        norm_num_groups=4,
        latent_channels=8,
    ).eval()

    def encode(image_B3SS: Tensor) -> Tensor:
        return autoencoder.encode(image_B3SS).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]

    preview = LinearPreview(encode, channels=8)
    images_B3SS = synthetic_pictures()
    with torch.no_grad():
        latents_BChw = encode(images_B3SS)
    cells_n9 = F.pad(latents_BChw.permute(0, 2, 3, 1).reshape(-1, 8), (0, 1), value=1.0)
    colours_n3 = F.avg_pool2d(images_B3SS, 4).permute(0, 2, 3, 1).reshape(-1, 3)
    error = (cells_n9 @ preview.matrix - colours_n3).square().mean()
    best = torch.linalg.lstsq(cells_n9.double(), colours_n3.double()).solution
    assert error <= 1.01 * (cells_n9.double() @ best - colours_n3).square().mean() + 1e-4
    assert error < colours_n3.var()
    assert preview(latents_BChw[40]).size == (64, 64)
