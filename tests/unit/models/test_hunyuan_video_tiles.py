"""Decoding tile by tile against the autoencoder's own tiled decoding: every bit, every tile, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from gesso.engine.device import has_fast_bfloat16
from gesso.models import hunyuan_video_cost
from gesso.models.hunyuan_video_tiles import Tiling, decode_in_tiles
from tests.tiny_hunyuan_video import POOLED_WIDTH, TEXT_WIDTH, tiny_autoencoder, tiny_transformer
from tests.unit.models.live_bytes import most_live_bytes
from tests.unit.models.resident_bytes import in_fresh_process, measured, most_resident_bytes

# Latent frames, rows, columns: less than a tile, just one, more in either direction, and ends of all lengths.
SIZES = [(1, 2, 3), (4, 4, 4), (5, 4, 4), (6, 5, 4), (7, 3, 9), (8, 8, 7), (12, 4, 5)]


def counted(action: Any) -> int:
    """PyTorch's count. It does not know the CPU's own kernel for attention, so that one is spelled out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKLHunyuanVideo:
    """Tiles of four by four cells, three apart."""
    return tiny_autoencoder(32, 24)


@pytest.mark.parametrize("size", SIZES)
def test_every_bit_is_that_of_tiled_decoding(
    autoencoder: AutoencoderKLHunyuanVideo, size: tuple[int, int, int]
) -> None:
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    made: list[Tensor] = []
    breaths = 0
    for stretch in decode_in_tiles(autoencoder, latent):
        breaths += stretch is None
        made += [] if stretch is None else [stretch.clone()]
    autoencoder.enable_tiling()
    with torch.no_grad():
        wanted = autoencoder.decode(latent, return_dict=False)[0]
    assert torch.equal(torch.cat(made, dim=2), wanted)
    assert breaths == len(list(Tiling.of(autoencoder).tiles(*size)))
    assert all(stretch.shape[2] > 0 for stretch in made)


def test_frames_come_before_the_last_tile_is_decoded(autoencoder: AutoencoderKLHunyuanVideo) -> None:
    parts = list(decode_in_tiles(autoencoder, torch.zeros(1, 4, 9, 8, 8)))
    first = next(index for index, part in enumerate(parts) if part is not None)
    assert first == 9  # three by three tiles
    assert len(parts) > 2 * first
    assert parts[first].shape == (1, 3, 13, 64, 64)  # pyright: ignore[reportOptionalMemberAccess]


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 2, 3), (7, 3, 9)])
@pytest.mark.parametrize("attends", [True, False])
def test_operations_of_decoding(size: tuple[int, int, int], attends: bool) -> None:
    network = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 24),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=attends,
    )
    network.tile_sample_min_height, network.tile_sample_stride_height = 32, 24
    expected = counted(lambda: list(decode_in_tiles(network, torch.zeros(1, 4, *size))))
    config: Any = network.config
    found = hunyuan_video_cost.decode_flops(config, Tiling.of(network), *size)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("size", "text_tokens"), [((1, 4, 4), 7), ((3, 8, 12), 20)])
def test_operations_of_the_transformer(size: tuple[int, int, int], text_tokens: int) -> None:
    network: Any = tiny_transformer(num_layers=2, num_single_layers=3, num_refiner_layers=2)
    values = {
        "hidden_states": torch.zeros(1, 4, *size),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, text_tokens, TEXT_WIDTH),
        "encoder_attention_mask": torch.ones(1, text_tokens),
        "pooled_projections": torch.zeros(1, POOLED_WIDTH),
        "guidance": torch.zeros(1),
    }
    tokens = size[0] * size[1] * size[2] // 4
    found = hunyuan_video_cost.transformer_flops(network.config, tokens, text_tokens)
    assert found == pytest.approx(counted(lambda: network(**values)), rel=1e-3)


def test_the_published_network() -> None:
    """20 blocks of two streams and 40 of one, 24 heads of 128; nearly 13 billion weights."""
    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel()
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_821_012_544
    config: Any = network.config
    tokens = 33 * 45 * 80
    flops = hunyuan_video_cost.transformer_flops(config, tokens, 256)
    assert 1.1e16 < flops < 1.3e16  # most of it attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_the_transformer_at_once(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        network: Any = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=2)
        nn.Module.to(network, dtype)
        values = {
            "hidden_states": torch.zeros(1, 16, 9, 68, 120, dtype=dtype),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 256, 4096, dtype=dtype),
            "encoder_attention_mask": torch.ones(1, 256, dtype=dtype),
            "pooled_projections": torch.zeros(1, 768, dtype=dtype),
            "guidance": torch.zeros(1, dtype=dtype),
        }
        expected = most_live_bytes(lambda: network(**values), network)
    found = hunyuan_video_cost.transformer_peak_bytes(network.config, 9 * 34 * 60, 256, dtype.itemsize)
    assert found == pytest.approx(expected, rel=0.05)


def decoding(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes measured and foreseen of four tiles, the first of them whole."""
    values: dict[str, Any] = {"latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 16}
    widths: list[Any] = [(16,) * 4, (32, 64, 64, 64)]
    small, large = (AutoencoderKLHunyuanVideo(block_out_channels=channels, **values) for channels in widths)
    for network in (small, large):
        nn.Module.to(network, dtype)
        network.tile_sample_min_height = network.tile_sample_min_width = 80
        network.tile_sample_stride_height = network.tile_sample_stride_width = 64

    def decode(network: AutoencoderKLHunyuanVideo, *size: int) -> None:
        for _ in decode_in_tiles(network, torch.zeros(1, 16, *size, dtype=dtype)):
            pass

    size = (5, 10, 14)
    found = most_resident_bytes(lambda: decode(large, *size), before=lambda: decode(small, 2, 4, 4))
    return found, hunyuan_video_cost.decode_peak_bytes(large.config, Tiling.of(large), *size, dtype.itemsize)


_in_hardware = pytest.mark.skipif(not has_fast_bfloat16(), reason="a processor without bfloat16 unfolds convolutions")


@measured
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=_in_hardware)])
def test_bytes_of_decoding_at_once(dtype: torch.dtype) -> None:
    found, foreseen = in_fresh_process(decoding, dtype)
    assert found == pytest.approx(foreseen, rel=0.1)


def test_bytes_of_reading_at_once() -> None:
    """A quarter of Llama 3 8B's width, in its proportions; few of its layers stand for all."""
    values: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4}
    config = LlamaConfig(**values, num_attention_heads=8, num_key_value_heads=2, vocab_size=16)
    network: Any = LlamaModel(config)
    ids, mask = torch.zeros(1, 351, dtype=torch.long), torch.ones(1, 351, dtype=torch.long)
    mask[:, -1] = 0
    expected = most_live_bytes(
        lambda: network(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False), network
    )
    found = hunyuan_video_cost.text_peak_bytes(config.to_dict(), 351, 4)
    assert found == pytest.approx(expected, rel=0.1)
