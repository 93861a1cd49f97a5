"""What HunyuanVideo costs: floating-point operations and bytes, counted from diffusers' configurations of its networks.

Here: the transformer, and the decoder tile by tile. Conventions, and what families have in common, are in `flux_cost`.
Not here: what a request adds up to (`pipelines/hunyuan_video_plan`).
"""

from __future__ import annotations

from collections.abc import Iterator

from gesso.models.flux_cost import Config, Product, blocks
from gesso.models.hunyuan_video_tiles import Tiling

_TIME_FEATURES = 256
_TAPS = 27  # of a convolution
# Held at once beside weights, counted over networks of published size. A single block at its rotary embedding holds
# rows of so many widths, and so many bytes of each width more, since there it calculates in float32.
_ROWS_HELD, _ROTARY_BYTES = 14, 8
_STATES_HELD = 2  # of Llama, beside one a layer
_PLANES_HELD = 3  # of a stretch's pixels: tiles, what they are joined to, and the stretch before
_HALF = 2  # bytes of a number of 16 bits


def transformer_flops(config: Config, video_tokens: int, text_tokens: int) -> float:
    """Operations of one forward for one video: all matrix products, and attention over all tokens in every block."""
    layers = config["num_layers"] + config["num_single_layers"]
    attention = 4.0 * (video_tokens + text_tokens) ** 2 * layers + 4.0 * text_tokens**2 * config["num_refiner_layers"]
    products = _products(config, video_tokens, text_tokens)
    return sum(product.flops for product in products) + attention * _width(config)


def transformer_bytes(config: Config, video_tokens: int, text_tokens: int, weights: int, bytes_each: int) -> float:
    """Bytes moved by one forward for one video: `weights` bytes of parameters once, and the activations."""
    moved = sum(product.moved for product in _products(config, video_tokens, text_tokens))
    layers = config["num_layers"] + config["num_single_layers"]
    attention = 4.0 * (video_tokens + text_tokens) * _width(config) * layers
    return weights + (moved + attention) * bytes_each


def transformer_peak_bytes(config: Config, video_tokens: int, text_tokens: int, bytes_each: int) -> int:
    """About what a forward holds at once beside its weights."""
    return (video_tokens + text_tokens) * _width(config) * (_ROWS_HELD * bytes_each + _ROTARY_BYTES)


def text_peak_bytes(config: Config, tokens: int, bytes_each: int) -> int:
    """About what Llama holds at once beside its weights: what leaves every layer, and one layer at its widest."""
    states = (config["num_hidden_layers"] + _STATES_HELD) * config["hidden_size"]
    return tokens * (states + 3 * config["intermediate_size"]) * bytes_each


def decode_flops(config: Config, tiling: Tiling, frames: int, height: int, width: int) -> float:
    """Operations of decoding so many latent frames, rows and columns, overlaps of tiles included."""
    return sum(_tile_flops(config, *tile) for tile in tiling.tiles(frames, height, width))


def decode_peak_bytes(config: Config, tiling: Tiling, frames: int, height: int, width: int, bytes_each: int) -> int:
    """About what decoding holds at once beside its weights: the largest tile at full size, and finished stretches.

    That is where the last level begins, with the channels of the level before: frames enlarged, joined to the first,
    padded, and convolved; or within it, where what it began with is still held. A convolution has what it reads once
    more in the layout of its kernel, and in 16 bits what it writes as well.
    """
    edge, fine = config["spatial_compression_ratio"], config["block_out_channels"][0]
    coarse = max(config["block_out_channels"][:2])
    deep, high, wide = next(tiling.tiles(frames, height, width))
    shown = (deep - 1) * config["temporal_compression_ratio"] + 1
    cells, padded = ((shown + more) * (high * edge + more) * (wide * edge + more) for more in (0, 2))
    convolving = 2 * padded + cells * (2 if bytes_each <= _HALF else 1)
    tile = max(coarse * (2.25 * cells + convolving), coarse * cells + fine * (2 * cells + convolving))
    stretches = _PLANES_HELD * shown * height * width * edge**2 * config["out_channels"]
    return int((tile + stretches) * bytes_each)


def _products(config: Config, video_tokens: int, text_tokens: int) -> Iterator[Product]:
    """Every matrix product of a forward but attention's own."""
    d, ratio = _width(config), int(config["mlp_ratio"])
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    yield Product(video_tokens, config["in_channels"] * patch, d)
    yield Product(text_tokens, config["text_embed_dim"], d)
    for width in (_TIME_FEATURES, config["text_embed_dim"]):  # the refiner's own time, and its text's mean
        yield from (Product(1, width, d), Product(1, d, d))
    for _ in range(config["num_refiner_layers"]):
        yield from (Product(text_tokens, d, 4 * d), Product(1, d, 2 * d))
        yield from (Product(text_tokens, d, ratio * d), Product(text_tokens, ratio * d, d))
    for width in (_TIME_FEATURES, _TIME_FEATURES, config["pooled_projection_dim"]):  # time, guidance and text
        yield from (Product(1, width, d), Product(1, d, d))
    yield from blocks(config, video_tokens, text_tokens, ratio)
    yield Product(1, d, 2 * d)
    yield Product(video_tokens, d, config["out_channels"] * patch)


def _width(config: Config) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _tile_flops(config: Config, frames: int, height: int, width: int) -> float:
    """Operations of one tile: a level's residual blocks, then space doubles in the first, time in the later ones."""
    channels, latent = list(reversed(config["block_out_channels"])), config["latent_channels"]
    cells, last = frames * height * width, len(channels) - 1
    total = 2.0 * cells * latent**2 + _convolution(cells, latent, channels[0])
    total += _residuals(cells, channels[0], channels[0], 2)
    if config["mid_block_add_attention"]:
        total += 8.0 * cells * channels[0] ** 2 + 4.0 * cells**2 * channels[0]
    in_space, in_time = (config[f"{name}_compression_ratio"].bit_length() - 1 for name in ("spatial", "temporal"))
    previous = channels[0]
    for level, current in enumerate(channels):
        total += _residuals(frames * height * width, previous, current, config["layers_per_block"] + 1)
        wider, longer = level < in_space, last - in_time <= level < last
        height, width = height * (1 + wider), width * (1 + wider)
        frames = 2 * frames - 1 if longer else frames
        total += _convolution(frames * height * width, current, current) if wider or longer else 0.0
        previous = current
    return total + _convolution(frames * height * width, previous, config["out_channels"])


def _convolution(cells: int, channels_in: int, channels_out: int) -> float:
    return 2.0 * _TAPS * cells * channels_in * channels_out


def _residuals(cells: int, channels_in: int, channels_out: int, count: int) -> float:
    """Residual blocks of two convolutions; the first changes the channels, with a product for its shortcut."""
    total = 0.0
    for _ in range(count):
        total += _convolution(cells, channels_in, channels_out) + _convolution(cells, channels_out, channels_out)
        total += 2.0 * cells * channels_in * channels_out * (channels_in != channels_out)
        channels_in = channels_out
    return total
