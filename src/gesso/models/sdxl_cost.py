"""What Stable Diffusion XL's UNet costs: floating-point operations and bytes, counted from diffusers' configuration.

A multiply-add counts as two operations; norms, activations and softmax are left out (below 1 %). What a product or
convolution reads and writes counts as moved once. Not here: most of autoencoder and texts (`flux_cost`), what
a request adds up to (`pipelines/sdxl_plan`).
Words: a level is a resolution, level 0 the latent's own; its cells are its places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gesso.models.flux_cost import Product

Config = Mapping[str, Any]
_TAPS = 9  # of a three by three convolution
_MLP_RATIO = 4
# Level-0 maps of the first width that are there at once, counted on the meta device for SDXL's own UNet, in the last
# residual block: skip connections, its input and all it makes. Likewise maps of the encoder's first level.
_MAPS_HELD, _ENCODER_MAPS_HELD = 15.75, 5
_TEXT_ROWS_HELD = 40  # rows of a token in the larger text encoder: one a layer, and what a layer makes


class Attention(NamedTuple):
    """Every one of `queries` looks at every one of `keys`, in `width` features of all heads."""

    queries: int
    keys: int
    width: int

    @property
    def flops(self) -> float:
        return 4.0 * self.queries * self.keys * self.width

    @property
    def moved(self) -> float:
        return 2.0 * (self.queries + self.keys) * self.width


def unet_flops(config: Config, height: int, width: int, text_tokens: int) -> float:
    """Operations of one forward for one sample of `height` by `width` latent cells."""
    return sum(part.flops for part in _parts(config, height, width, text_tokens))


def unet_bytes(config: Config, height: int, width: int, text_tokens: int, weights: int, bytes_each: int) -> float:
    """Bytes moved by one forward for one sample: `weights` bytes of parameters once, and the activations."""
    return weights + bytes_each * sum(part.moved for part in _parts(config, height, width, text_tokens))


def unet_peak_bytes(config: Config, height: int, width: int, samples: int, bytes_each: int) -> int:
    """About what a forward of so many samples holds at once beside its weights."""
    return int(samples * height * width * config["block_out_channels"][0] * _MAPS_HELD * bytes_each)


def encode_peak_bytes(config: Config, width: int, height: int, bytes_each: int) -> int:
    """About what the autoencoder's encoder holds at once beside its weights, for a picture of that many pixels."""
    return width * height * config["block_out_channels"][0] * _ENCODER_MAPS_HELD * bytes_each


def text_peak_bytes(texts: int, tokens: int, features: int, bytes_each: int) -> int:
    """About what the text encoders hold at once beside their weights."""
    return texts * tokens * features * _TEXT_ROWS_HELD * bytes_each


def _parts(config: Config, height: int, width: int, text_tokens: int) -> Iterator[Product | Attention]:
    channels = list(config["block_out_channels"])
    levels = [(height, width)]
    for _ in channels[1:]:
        levels.append((-(-levels[-1][0] // 2), -(-levels[-1][1] // 2)))
    cells = [rows * columns for rows, columns in levels]
    embedding = 4 * channels[0]
    yield from (Product(1, channels[0], embedding), Product(1, embedding, embedding))
    yield from (
        Product(1, config["projection_class_embeddings_input_dim"], embedding),
        Product(1, embedding, embedding),
    )
    yield Product(cells[0], _TAPS * config["in_channels"], channels[0])
    skips = [channels[0]]
    for level, current in enumerate(channels):
        before = channels[max(level - 1, 0)]
        for layer in range(config["layers_per_block"]):
            yield from _residual(cells[level], before if layer == 0 else current, current, embedding)
            if config["down_block_types"][level].startswith("CrossAttn"):
                yield from _transformer(config, cells[level], current, _depth(config, level), text_tokens)
            skips.append(current)
        if level + 1 < len(channels):
            yield Product(cells[level + 1], _TAPS * current, current)
            skips.append(current)
    yield from _residual(cells[-1], channels[-1], channels[-1], embedding)
    yield from _transformer(config, cells[-1], channels[-1], _depth(config, -1), text_tokens)
    yield from _residual(cells[-1], channels[-1], channels[-1], embedding)
    before = channels[-1]
    for block, level in enumerate(reversed(range(len(channels)))):
        current = channels[level]
        for _ in range(config["layers_per_block"] + 1):
            yield from _residual(cells[level], before + skips.pop(), current, embedding)
            if config["up_block_types"][block].startswith("CrossAttn"):
                yield from _transformer(config, cells[level], current, _depth(config, level), text_tokens)
            before = current
        if level:
            yield Product(cells[level - 1], _TAPS * current, current)
    yield Product(cells[0], _TAPS * channels[0], config["out_channels"])


def _residual(cells: int, channels_in: int, channels_out: int, embedding: int) -> Iterator[Product]:
    yield from (Product(cells, _TAPS * channels_in, channels_out), Product(cells, _TAPS * channels_out, channels_out))
    yield Product(1, embedding, channels_out)
    if channels_in != channels_out:
        yield Product(cells, channels_in, channels_out)


def _transformer(config: Config, cells: int, width: int, depth: int, text_tokens: int) -> Iterator[Product | Attention]:
    """Blocks of attention among the cells, attention to the text, and a gated MLP, between two products."""
    yield from (Product(cells, width, width), Product(cells, width, width))
    for _ in range(depth):
        yield from (Product(cells, width, 4 * width), Attention(cells, cells, width))
        yield from (Product(cells, width, 2 * width), Attention(cells, text_tokens, width))
        yield Product(text_tokens, config["cross_attention_dim"], 2 * width)
        yield from (Product(cells, width, 2 * _MLP_RATIO * width), Product(cells, _MLP_RATIO * width, width))


def _depth(config: Config, level: int) -> int:
    depths = config["transformer_layers_per_block"]
    return depths if isinstance(depths, int) else depths[level]
