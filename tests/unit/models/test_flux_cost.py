"""FLUX's operations as counted from configurations against PyTorch's own count of what is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gesso.models import flux_cost, flux_network
from tests.tiny_flux import LENGTH, POOLED_WIDTH, TEXT_WIDTH, tiny_autoencoder, tiny_text, tiny_transformer


def counted(action: Callable[[], object]) -> int:
    """PyTorch's count. It does not know the CPU's own kernel for attention, so that one is spelled out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize(("cells", "text_tokens"), [((8, 8), 20), ((12, 32), 7)])
def test_the_transformer(guidance_embeds: bool, cells: tuple[int, int], text_tokens: int) -> None:
    network: Any = tiny_transformer(guidance_embeds=guidance_embeds)
    positions_L3 = flux_network.positions(*cells)
    values = {
        "hidden_states": torch.zeros(1, len(positions_L3), 16),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1) if guidance_embeds else None,
        "pooled_projections": torch.zeros(1, POOLED_WIDTH),
        "encoder_hidden_states": torch.zeros(1, text_tokens, TEXT_WIDTH),
        "txt_ids": torch.zeros(text_tokens, 3),
        "img_ids": positions_L3,
    }
    expected = counted(lambda: network(**values))
    found = flux_cost.transformer_flops(network.config, len(positions_L3), text_tokens)
    assert found == pytest.approx(expected, rel=1e-3)


AUTOENCODERS: list[dict[str, Any]] = [
    {},
    {"layers_per_block": 2, "block_out_channels": (8, 16, 24), "mid_block_add_attention": False},
    {"use_quant_conv": True, "use_post_quant_conv": True, "block_out_channels": (16, 8)},
]


@pytest.mark.parametrize("changes", AUTOENCODERS)
def test_the_autoencoder(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {**tiny_autoencoder().config, **changes}
    levels = len(values["block_out_channels"])
    values |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    autoencoder: Any = AutoencoderKL(**values).eval()
    stride = 2 ** (levels - 1)
    encode = counted(lambda: autoencoder.encode(torch.zeros(1, 3, 48, 64)))
    decode = counted(lambda: autoencoder.decode(torch.zeros(1, 4, 48 // stride, 64 // stride)))
    assert flux_cost.encode_flops(autoencoder.config, 64, 48) == pytest.approx(encode, rel=1e-3)
    assert flux_cost.decode_flops(autoencoder.config, 64, 48) == pytest.approx(decode, rel=1e-3)


def test_text_is_about_right() -> None:
    """Attention is left out, which is half of it at this size, and little at the published one."""
    text = tiny_text(77)
    found, expected = flux_cost.text_flops([text], 77), counted(lambda: text.encode(["a red star"]))
    assert 0.4 * expected < found < expected


def test_bytes_count_weights_once_and_know_the_meta_device() -> None:
    network: Any = tiny_transformer()
    weights = flux_cost.weight_bytes([network])
    assert weights == 4 * sum(parameter.numel() for parameter in network.parameters())
    assert flux_cost.weight_bytes([network.to("meta")]) == weights
    few = flux_cost.transformer_bytes(network.config, 16, LENGTH, weights, 4)
    many = flux_cost.transformer_bytes(network.config, 64, LENGTH, weights, 4)
    assert weights < few < many
