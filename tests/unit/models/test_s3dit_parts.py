"""Parts of S3-DiT by themselves: patches, positions, rotation, cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.models.s3dit import cost
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.packing import (
    ContextShape,
    caption_positions,
    feature_positions,
    padded,
    patchify,
    picture_positions,
    unpatchify,
)
from gesso.models.s3dit.rotary import rotate, turns
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of
from tests.unit.models.small_s3dit import PICTURE_WIDTH, captions_of, drawn, latents_of, small_s3dit, times_of

SIDES = st.integers(1, 6)


@settings(max_examples=40)
@given(frames=st.integers(1, 3), rows=SIDES, columns=SIDES, patch=st.sampled_from([(1, 2), (2, 1), (1, 1), (1, 3)]))
def test_patches_are_undone(frames: int, rows: int, columns: int, patch: tuple[int, int]) -> None:
    size = (frames * patch[0], rows * patch[1], columns * patch[1])
    latent = drawn(3, *size)
    patches = patchify(latent, patch)
    assert tuple(patches.shape) == (frames * rows * columns, 3 * patch[0] * patch[1] ** 2)
    assert torch.equal(unpatchify(patches, size, patch), latent)


def test_channels_are_fastest_in_a_patch() -> None:
    latent = torch.arange(2 * 2 * 4).view(2, 1, 2, 4)
    assert patchify(latent, (1, 2)).tolist() == [[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]


@given(length=st.integers(0, 200))
def test_padding_fills_to_32(length: int) -> None:
    assert padded(length) % 32 == 0
    assert max(length, 1) <= padded(length) < max(length, 1) + 32


def test_positions_while_painting() -> None:
    shape = ContextShape(captions=(33,))
    assert caption_positions(shape).tolist() == [[1 + k, 0, 0] for k in range(64)]
    assert shape.starts() == [65]
    grid = [[65, row, column] for row in range(3) for column in range(2)]
    assert picture_positions(65, (1, 6, 4), (1, 2)).tolist() == grid + [[0, 0, 0]] * 26


def test_positions_while_editing() -> None:
    """Later pieces are shifted against their tokens by the padding before them, as published."""
    shape = ContextShape(captions=(30, 3, 2), conditions=((1, 8, 6),), features=((2, 3),), editing=True)
    frames = caption_positions(shape)[:, 0].tolist()
    assert frames == [*range(1, 33), 0, 0, *range(33, 63)] + [63, 64] + [0] * 29 + [38]
    assert shape.starts() == [31, 36]
    features = feature_positions(shape).tolist()
    assert features[:6] == [[32, 0, 0], [32, 0, 2], [32, 0, 5], [32, 7, 0], [32, 7, 2], [32, 7, 5]]
    assert features[6:] == [[0, 0, 0]] * (26 + 32)


def test_rotation_depends_on_differences_only() -> None:
    config = S3DiTConfig(dim=16, n_heads=1, n_kv_heads=1, axes_dims=(4, 6, 6))
    near, far = torch.tensor([[1, 2, 3], [4, 4, 1]]), torch.tensor([[101, 22, 403], [104, 24, 401]])
    query, key = drawn(2, 1, 1, 1, 16)

    def score(positions_23: torch.Tensor) -> torch.Tensor:
        by_23 = turns(config, positions_23)[None, :, None]
        return (rotate(query.clone(), by_23[:, :1]) * rotate(key.clone(), by_23[:, 1:])).sum()

    torch.testing.assert_close(score(near), score(far), atol=1e-4, rtol=0)
    assert rotate(query.clone(), turns(config, near)[None, :1, None]).norm() == pytest.approx(float(query.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_same_however_it_is_computed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, without, and as it is compiled."""
    config = S3DiTConfig(dim=16, n_heads=1, n_kv_heads=1, axes_dims=(4, 6, 6))
    x, by = drawn(2, 5, 3, 16).to(dtype), turns(config, torch.randint(0, 400, (5, 3)))[None, :, None]
    with torch.enable_grad():
        plain = rotate(x.clone(), by)
    with torch.no_grad():
        eager = rotate(x.clone(), by)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        compiled = rotate(x.clone(), by)
    assert plain.dtype == eager.dtype == compiled.dtype == dtype
    assert torch.equal(plain, eager)
    torch.testing.assert_close(compiled, plain)


def test_angles_are_computed_in_double_precision() -> None:
    config = S3DiTConfig()
    positions = torch.tensor([[1535, 511, 510]])
    frequencies = 256.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    expected = (1535 * frequencies).float()
    assert torch.equal(turns(config, positions)[0, :16, 0], expected.cos())
    with pytest.raises(ValueError, match="row 512 is beyond"):
        turns(config, torch.tensor([[0, 512, 0]]))


@torch.no_grad()
def test_operations_are_those_that_torch_counts() -> None:
    network = small_s3dit()
    grid = [drawn(4, 5, PICTURE_WIDTH)]
    edit = Prompt(captions_of(5, 40, 7), latents_of((1, 8, 8)), grid, editing=True)
    for prompts, latent in (
        ([Prompt([c]) for c in captions_of(7, 40)], drawn(4, 1, 16, 12)),
        ([edit], drawn(4, 1, 8, 8)),
    ):
        shapes = [prompt.shape for prompt in prompts]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused kernels
            contexts = network.read(prompts)
        read = sum(cost.read_flops(network.config, shape) for shape in shapes)
        assert abs(read - counter.get_total_flops()) < 0.02 * read
        company = network.join([size_of(latent)], contexts, [0] * len(prompts))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network([latent], times_of(1), company)
        step = cost.evaluation_flops(network.config, size_of(latent), shapes)
        # A network this small spends more than a percent on its times.
        assert abs(step - counter.get_total_flops()) < 0.1 * step


def test_a_megapixel_in_full() -> None:
    """6 billion parameters, 4096 tokens and 32 of text: about 2 x 6e9 x 4128 operations, and attention."""
    config = S3DiTConfig()
    flops = cost.evaluation_flops(config, (1, 128, 128), [ContextShape(captions=(20,))])
    assert 5.5e13 < flops < 6.5e13


def test_full_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = S3DiT(S3DiTConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 6154908736
    assert len(network.state_dict()) == 521
