"""What Qwen-Image costs: floating-point operations and bytes, counted from diffusers' configurations of its networks.

Here: the transformer, and the autoencoder as it is run for a picture, a video of one frame. Conventions, and what
families have in common, are in `flux_cost`. Not here: what a request adds up to (`pipelines/qwen_image_plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gesso.models.flux_cost import Config, Product

_TIME_FEATURES = 256
_MLP_RATIO = 4
_TAPS_3D, _TAPS_2D = 27, 9  # of a convolution; a causal one is run over frames of zeros before the first as well
# Held at once beside weights, counted in runs of the published sizes: rows of an image token and of a text token while
# the MLP runs, and maps of full size at the decoder's end, where a convolution pads a picture with frames of zeros.
_IMAGE_ROWS_HELD, _TEXT_ROWS_HELD = 15, 4
_MAPS_HELD, _MAPS_COPIED = 7, 3  # into the layout of the convolution's kernel; in 16 bits one more, which it writes
_HALF = 2  # bytes of a number of 16 bits


def transformer_flops(config: Config, image_tokens: int, text_tokens: int) -> float:
    """Operations of one forward for one picture: all matrix products, and attention over all tokens in every block."""
    attention = 4.0 * (image_tokens + text_tokens) ** 2 * _width(config) * config["num_layers"]
    return sum(product.flops for product in _products(config, image_tokens, text_tokens)) + attention


def transformer_bytes(config: Config, image_tokens: int, text_tokens: int, weights: int, bytes_each: int) -> float:
    """Bytes moved by one forward for one picture: `weights` bytes of parameters once, and the activations."""
    moved = sum(product.moved for product in _products(config, image_tokens, text_tokens))
    attention = 4.0 * (image_tokens + text_tokens) * _width(config) * config["num_layers"]
    return weights + (moved + attention) * bytes_each


def transformer_peak_bytes(config: Config, image_tokens: int, text_tokens: int, bytes_each: int) -> int:
    """About what a forward holds at once beside its weights."""
    rows = _IMAGE_ROWS_HELD * image_tokens + _TEXT_ROWS_HELD * text_tokens
    return rows * _width(config) * bytes_each


def encode_flops(config: Config, width: int, height: int) -> float:
    """Operations of the autoencoder's encoder for a picture of that many pixels."""
    channels, cells = _channels(config), width * height
    total = _convolution(cells, config["input_channels"], channels[0])
    previous, scale = channels[0], 1.0
    for level, current in enumerate(channels):
        total += _residuals(cells, previous, current, config["num_res_blocks"])
        total += _attention(cells, current) * config["num_res_blocks"] * (scale in config["attn_scales"])
        if level + 1 < len(channels):
            cells, scale = cells // 4, scale / 2
            total += _convolution(cells, current, current, _TAPS_2D)
        previous = current
    twice = 2 * config["z_dim"]
    return total + _middle(cells, previous) + _convolution(cells, previous, twice) + 2.0 * cells * twice**2


def decode_flops(config: Config, width: int, height: int) -> float:
    """Operations of the autoencoder's decoder for a picture of that many pixels."""
    channels, latent = _channels(config)[::-1], config["z_dim"]
    cells = width * height // 4 ** (len(channels) - 1)
    total = 2.0 * cells * latent**2 + _convolution(cells, latent, channels[0]) + _middle(cells, channels[0])
    previous = channels[0]
    for level, current in enumerate(channels):
        total += _residuals(cells, previous, current, config["num_res_blocks"] + 1)
        previous = current
        if level + 1 < len(channels):
            cells, previous = cells * 4, current // 2
            total += _convolution(cells, current, previous, _TAPS_2D)
    return total + _convolution(cells, previous, config["input_channels"])


def decode_peak_bytes(config: Config, width: int, height: int, bytes_each: int) -> int:
    """About what the decoder holds at once beside its weights: maps at full size. The encoder begins with as many."""
    maps = _MAPS_HELD + _MAPS_COPIED + (bytes_each <= _HALF)
    return maps * width * height * _channels(config)[0] * bytes_each


def _products(config: Config, image_tokens: int, text_tokens: int) -> Iterator[Product]:
    """Every matrix product of a forward but attention's own, in the order of the network."""
    d = _width(config)
    yield Product(image_tokens, config["in_channels"], d)
    yield Product(text_tokens, config["joint_attention_dim"], d)
    yield from (Product(1, _TIME_FEATURES, d), Product(1, d, d))
    for _ in range(config["num_layers"]):
        for rows in (image_tokens, text_tokens):
            yield Product(1, d, 6 * d)
            yield Product(rows, d, 4 * d)  # query, key, value and the way out
            yield from (Product(rows, d, _MLP_RATIO * d), Product(rows, _MLP_RATIO * d, d))
    yield Product(1, d, 2 * d)
    yield Product(image_tokens, d, config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"]))


def _width(config: Config) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _channels(config: Config) -> Sequence[int]:
    """Of each level, finest first."""
    return [config["base_dim"] * factor for factor in config["dim_mult"]]


def _convolution(cells: int, channels_in: int, channels_out: int, taps: int = _TAPS_3D) -> float:
    return 2.0 * taps * cells * channels_in * channels_out


def _residuals(cells: int, channels_in: int, channels_out: int, count: int) -> float:
    """Residual blocks of two convolutions; the first changes the channels, with a product for its shortcut."""
    total = 0.0
    for _ in range(count):
        total += _convolution(cells, channels_in, channels_out) + _convolution(cells, channels_out, channels_out)
        total += 2.0 * cells * channels_in * channels_out * (channels_in != channels_out)
        channels_in = channels_out
    return total


def _attention(cells: int, channels: int) -> float:
    return 8.0 * cells * channels**2 + 4.0 * cells**2 * channels


def _middle(cells: int, channels: int) -> float:
    """Two residual blocks at the coarsest level, and attention between them."""
    return _residuals(cells, channels, channels, 2) + _attention(cells, channels)
