"""Multi-scale BSQ: what bits say is what quantizing said, for any number of bits and any grids."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gesso.models.infinity.correction import draw_flips, training_tokens
from gesso.models.infinity.quantizer import codes, entropy, from_tokens, quantize, sum_of_codes, to_tokens
from gesso.models.infinity.scales import Grid

GRIDS: tuple[Grid, ...] = ((1, 1), (2, 3), (4, 3), (5, 6))

grid_lists = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


def _latent(bits: int, grid: Grid, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, bits, *grid, generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from([1, 2, 7, 14, 16, 32, 64, 65]), grids=grid_lists, seed=st.integers(0, 2**31))
def test_bits_carry_the_whole_latent(bits: int, grids: list[Grid], seed: int) -> None:
    quantized = quantize(_latent(bits, grids[-1], seed), grids)
    torch.testing.assert_close(sum_of_codes(quantized.bits, grids[-1]), quantized.sum_BKHW)
    for scale, grid in zip(quantized.bits, grids, strict=True):
        assert scale.shape == (2, bits, *grid)
        torch.testing.assert_close(codes(scale).norm(dim=1), torch.ones(2, *grid))


def test_an_entry_of_zero_is_a_zero_bit() -> None:
    assert not quantize(torch.zeros(1, 4, 2, 2), [(2, 2)]).bits[0].any()


def test_gradient_is_that_of_the_normalised_residual() -> None:
    """On one scale the straight-through gradient is the gradient of normalising."""
    latent, weight = _latent(8, (3, 3)).requires_grad_(), _latent(8, (3, 3), seed=1)
    (straight,) = torch.autograd.grad((quantize(latent, [(3, 3)]).sum_BKHW * weight).sum(), latent)
    (normal,) = torch.autograd.grad((F.normalize(latent, dim=1) * weight).sum(), latent)
    torch.testing.assert_close(straight, normal)


@pytest.mark.parametrize("patchify", [False, True])
def test_tokens_go_there_and_back(patchify: bool) -> None:
    latent = _latent(6, (4, 6))
    grid = (2, 3) if patchify else (4, 6)
    tokens = to_tokens(latent, patchify)
    assert tokens.shape == (2, grid[0] * grid[1], 24 if patchify else 6)
    assert torch.equal(from_tokens(tokens, grid, patchify), latent)


def test_patchified_channels_are_row_then_column_within_each_bit() -> None:
    cells = torch.arange(2 * 2 * 2.0).view(1, 2, 2, 2)
    assert to_tokens(cells, True).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_entropy_of_certain_and_of_open_bits() -> None:
    sure = F.normalize(torch.ones(1, 16, 4, 4), dim=1)
    sure[..., :2] *= -1
    per_cell, codebook, odds = entropy(sure)
    assert float(per_cell) < 1e-3
    assert float(codebook) == pytest.approx(16 * math.log(2), rel=1e-3)  # each bit is one in half of the cells
    torch.testing.assert_close(odds, torch.full((16, 2), 0.5))
    assert float(entropy(torch.zeros(1, 16, 4, 4))[0]) == pytest.approx(16 * math.log(2), rel=1e-3)


def test_without_flips_training_sees_what_quantizing_sums() -> None:
    latent = _latent(8, GRIDS[-1])
    quantized, tokens = quantize(latent, GRIDS), training_tokens(latent, GRIDS)
    labels = torch.cat([to_tokens(bits.to(torch.uint8), False) for bits in quantized.bits], dim=1)
    assert torch.equal(tokens.labels_BLK, labels.bool())
    final = sum_of_codes(quantized.bits[:-1], GRIDS[-1])
    torch.testing.assert_close(tokens.inputs_BLK[:, -30:], to_tokens(final, False))


def test_later_labels_repair_flipped_bits() -> None:
    """With every bit of the first scale flipped the codes still approach the latent; else the damage stays."""
    grids = ((1, 1), *[(4, 4)] * 6)
    latent = codes(_latent(8, (4, 4)) > 0)
    flips = [torch.ones(2, 8, 1, 1, dtype=torch.bool)]
    labels = training_tokens(latent, grids, flips).labels_BLK.split([1, *[16] * 6], dim=1)
    bits = [from_tokens(label.to(torch.uint8), grid, False).bool() for label, grid in zip(labels, grids, strict=True)]
    kept = [bits[0] ^ flips[0], *bits[1:]]
    ignored = [~quantize(latent, grids).bits[0], *quantize(latent, grids).bits[1:]]
    repaired, damaged = ((sum_of_codes(seen, (4, 4)) - latent).norm() for seen in (kept, ignored))
    assert repaired < damaged / 1.5


def test_without_requantizing_flips_change_nothing() -> None:
    latent = _latent(8, GRIDS[-1])
    flips = [torch.ones(2, 8, *grid, dtype=torch.bool) for grid in GRIDS]
    plain, flipped = training_tokens(latent, GRIDS), training_tokens(latent, GRIDS, flips, requantize=False)
    assert torch.equal(plain.inputs_BLK, flipped.inputs_BLK)


def test_flips_are_drawn_for_the_first_scales_at_one_rate_each() -> None:
    latent = torch.zeros(64, 16, 8, 8)
    grids = [(4, 4), (8, 8), (8, 8)]

    def flips_of(seed: int) -> list[Tensor]:
        return draw_flips(latent, grids, strength=0.3, scales=2, generator=torch.Generator().manual_seed(seed))

    assert [tuple(flip.shape) for flip in flips_of(0)] == [(64, 16, 4, 4), (64, 16, 8, 8)]
    shares = [float(flip.float().mean()) for seed in range(40) for flip in flips_of(seed)]
    assert min(shares) < 0.03
    assert 0.27 < max(shares) < 0.32
    assert all(torch.equal(flip, once_more) for flip, once_more in zip(flips_of(7), flips_of(7), strict=True))
