"""What Infinity costs: floating-point operations and bytes, counted from its sizes.

A multiply-add counts as two operations. Norms, activations and sampling are left out: they are below 1 %.
"""

from __future__ import annotations

from gesso.models.infinity.autoencoder import AutoencoderConfig
from gesso.models.infinity.scales import Grid, ScaleSchedule
from gesso.models.infinity.transformer import InfinityConfig


def scale_flops(config: InfinityConfig, schedule: ScaleSchedule, scale: int, text_tokens: int) -> float:
    """Operations of one row (one picture, one guidance branch) at one scale."""
    start, end = schedule.starts[scale], schedule.starts[scale + 1]
    n, width = end - start, config.width
    linear = 2 * n * (6 * width**2 + 2 * width * config.hidden)  # qkv, out; cross query, out; feed-forward
    attention = 4 * n * (end + text_tokens) * width
    ends = 2 * n * width * 3 * config.bits  # code embedding and head
    return config.depth * (linear + attention) + ends


def text_flops(config: InfinityConfig, text_tokens: int) -> float:
    """Operations of projecting a prompt's features for all blocks, and of what modulates their norms."""
    width, inner = config.width, config.text_width
    project = 2 * text_tokens * (inner * width + width**2 + 2 * inner * width) + 2 * width**2
    modulation = 2 * (6 + 2) * width**2
    return project + modulation + config.depth * 4 * text_tokens * width**2


def cache_bytes(config: InfinityConfig, schedule: ScaleSchedule, rows: int, bytes_each: int) -> int:
    """Keys and values of all scales but the last."""
    return config.depth * 2 * rows * schedule.starts[-2] * config.width * bytes_each


def decode_flops(config: AutoencoderConfig, latent_grid: Grid) -> float:
    """Operations of the decoder, convolutions only."""
    widths = [config.width * multiplier for multiplier in config.decoder_multipliers]
    cells = latent_grid[0] * latent_grid[1]
    previous = widths[-1]
    total = 18.0 * cells * (config.bits * previous + 4 * previous**2)
    for index in reversed(range(len(widths))):
        width = widths[index]
        for block in range(config.residual_blocks + 1):
            source = previous if block == 0 else width
            total += 18.0 * cells * (source * width + width**2) + (2.0 * cells * source * width * (source != width))
        if 1 <= index < config.stride.bit_length():
            cells *= 4
            total += 18.0 * cells * width**2
        previous = width
    return total + 18.0 * cells * previous * 3


def encode_flops(config: AutoencoderConfig, latent_grid: Grid) -> float:
    """Operations of the encoder, convolutions only; `latent_grid` is what it makes."""
    cells = latent_grid[0] * latent_grid[1] * config.stride**2
    previous = config.width
    total = 18.0 * cells * 3 * previous
    for index, multiplier in enumerate(config.encoder_multipliers):
        width = config.width * multiplier
        for block in range(config.residual_blocks):
            source = previous if block == 0 else width
            total += 18.0 * cells * (source * width + width**2) + (2.0 * cells * source * width * (source != width))
        if index < config.stride.bit_length() - 1:
            cells //= 4
            total += 18.0 * cells * width**2
        previous = width
    return total + 18.0 * cells * (4 * previous**2 + previous * config.bits)


def decode_peak_bytes(config: AutoencoderConfig, latent_grid: Grid, bytes_each: int) -> int:
    """About what the decoder holds at once: four activations of its widest level at full size."""
    height, width = latent_grid[0] * config.stride, latent_grid[1] * config.stride
    first_widths = [config.width * multiplier for multiplier in config.decoder_multipliers[:2]]
    return 4 * height * width * max(first_widths) * bytes_each
