"""What FLUX costs: floating-point operations and bytes, counted from diffusers' configurations of its networks.

Here: the transformer, and what Z-Image has in common with it, the KL autoencoder and a rough count for text encoders.
A multiply-add counts as two operations; norms, activations and softmax are left out (below 1 %). Every activation that
a matrix product reads or writes counts as moved once. Not here: what a request adds up to (`pipelines/flux_plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

Config = Mapping[str, Any]
_TIME_FEATURES = 256
_MLP_RATIO = 4
_ACTIVATIONS_HELD = 16  # widths of a token's row that a single block holds at once: 4 of MLP twice, q k v, and its ends


class Product(NamedTuple):
    """A matrix product of `rows` by `width_in` times `width_in` by `width_out`."""

    rows: int
    width_in: int
    width_out: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.width_in * self.width_out

    @property
    def moved(self) -> float:
        """Activations read and written; the weights are counted apart."""
        return float(self.rows) * (self.width_in + self.width_out)


def transformer_flops(config: Config, image_tokens: int, text_tokens: int) -> float:
    """Operations of one forward for one picture: all matrix products, and attention over all tokens in every block."""
    width, blocks = _width(config), config["num_layers"] + config["num_single_layers"]
    attention = 4.0 * (image_tokens + text_tokens) ** 2 * width
    return sum(product.flops for product in _products(config, image_tokens, text_tokens)) + blocks * attention


def transformer_bytes(config: Config, image_tokens: int, text_tokens: int, weights: int, bytes_each: int) -> float:
    """Bytes moved by one forward for one picture: `weights` bytes of parameters once, and the activations."""
    moved = sum(product.moved for product in _products(config, image_tokens, text_tokens))
    attention = (
        4.0 * (image_tokens + text_tokens) * _width(config) * (config["num_layers"] + config["num_single_layers"])
    )
    return weights + (moved + attention) * bytes_each


def transformer_peak_bytes(config: Config, image_tokens: int, text_tokens: int, bytes_each: int) -> int:
    """About what a forward holds at once beside its weights."""
    return (image_tokens + text_tokens) * _width(config) * _ACTIVATIONS_HELD * bytes_each


def encode_flops(config: Config, width: int, height: int) -> float:
    """Operations of the autoencoder's encoder for a picture of that many pixels."""
    channels, cells = list(config["block_out_channels"]), width * height
    total = _convolution(cells, config["in_channels"], channels[0])
    previous = channels[0]
    for level, current in enumerate(channels):
        total += _residuals(cells, previous, current, config["layers_per_block"])
        if level + 1 < len(channels):
            cells //= 4
            total += _convolution(cells, current, current)
        previous = current
    twice = 2 * config["latent_channels"]
    total += _middle(config, cells) + _convolution(cells, channels[-1], twice)
    return total + (2.0 * cells * twice**2 if config["use_quant_conv"] else 0.0)


def decode_flops(config: Config, width: int, height: int) -> float:
    """Operations of the autoencoder's decoder for a picture of that many pixels."""
    channels = list(reversed(config["block_out_channels"]))
    cells = width * height // 4 ** (len(channels) - 1)
    latent = config["latent_channels"]
    total = 2.0 * cells * latent**2 if config["use_post_quant_conv"] else 0.0
    total += _convolution(cells, latent, channels[0]) + _middle(config, cells)
    previous = channels[0]
    for level, current in enumerate(channels):
        total += _residuals(cells, previous, current, config["layers_per_block"] + 1)
        if level + 1 < len(channels):
            cells *= 4
            total += _convolution(cells, current, current)
        previous = current
    return total + _convolution(cells, previous, config["out_channels"])


def encode_peak_bytes(config: Config, width: int, height: int, bytes_each: int) -> int:
    """About what the encoder holds at once beside its weights: five maps at full size.

    A residual block keeps its input and reads and writes a map; on a CPU both are copied into the layout of its kernel.
    """
    return 5 * width * height * config["block_out_channels"][0] * bytes_each


def decode_peak_bytes(config: Config, width: int, height: int, bytes_each: int) -> int:
    """About what the decoder holds at once beside its weights, at full size.

    That is where the last level begins, with the channels of the level before: a map enlarged, convolved, and on a CPU
    both once more in the layout of the kernel; or a residual block's input, the map it reads, and what it writes.
    """
    fine, coarse = config["block_out_channels"][0], max(config["block_out_channels"][:2])
    return int(max(3.75 * coarse, 3 * coarse + 1.5 * fine)) * width * height * bytes_each


def features_bytes(config: Config, tokens: int, bytes_each: int) -> int:
    """Of what a text encoder makes of one text for the transformer."""
    return tokens * config["joint_attention_dim"] * bytes_each


def text_peak_bytes(networks: Iterable[nn.Module], tokens: int, bytes_each: int) -> int:
    """About what the largest of these text encoders holds at once beside its weights, for one text.

    That is a feed-forward's two halves and their product, and the stream; or attention where it needs more.
    """
    most = 0
    for network in (part for each in networks for part in ([each] if hasattr(each, "config") else each.children())):
        values: Any = network.config
        width = getattr(values, "d_model", None) or getattr(values, "hidden_size", None) or values.width
        inner = getattr(values, "d_ff", None) or getattr(values, "intermediate_size", None) or 4 * width
        held = 3 * tokens * (inner + width) * bytes_each
        if hasattr(values, "d_kv"):  # T5, whose attention is given a bias a head: it, its copy, and tables of distances
            wide = values.num_heads * (2 * tokens + 4 * values.d_kv)
            held = max(held, tokens * (wide * bytes_each + 24 * tokens))
        most = max(most, held)
    return most


def text_flops(networks: Iterable[nn.Module], tokens: int) -> float:
    """About the operations of encoding one text: a multiply-add for every token and weight that is no embedding."""
    return 2.0 * tokens * sum(_matrix_weights(network) for network in networks)


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes of all parameters, also of those on the meta device."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


def _products(config: Config, image_tokens: int, text_tokens: int) -> Iterator[Product]:
    """Every matrix product of a forward but attention's own, in the order of the network."""
    d, image, text = _width(config), image_tokens, text_tokens
    yield Product(image, config["in_channels"], d)
    yield Product(text, config["joint_attention_dim"], d)
    for _ in range(2 if config["guidance_embeds"] else 1):
        yield from (Product(1, _TIME_FEATURES, d), Product(1, d, d))
    yield from (Product(1, config["pooled_projection_dim"], d), Product(1, d, d))
    yield from blocks(config, image, text)
    yield Product(1, d, 2 * d)
    yield Product(image, d, config.get("out_channels") or config["in_channels"])


def blocks(config: Config, image_tokens: int, text_tokens: int, mlp_ratio: int = _MLP_RATIO) -> Iterator[Product]:
    """The matrix products of all blocks, two streams and then one, but attention's own."""
    d = _width(config)
    for _ in range(config["num_layers"]):
        for rows in (image_tokens, text_tokens):
            yield Product(1, d, 6 * d)
            yield Product(rows, d, 4 * d)  # query, key, value and the way out
            yield from (Product(rows, d, mlp_ratio * d), Product(rows, mlp_ratio * d, d))
    for _ in range(config["num_single_layers"]):
        yield Product(1, d, 3 * d)
        yield Product(image_tokens + text_tokens, d, (3 + mlp_ratio) * d)
        yield Product(image_tokens + text_tokens, (1 + mlp_ratio) * d, d)


def _width(config: Config) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _convolution(cells: int, channels_in: int, channels_out: int) -> float:
    """Three by three."""
    return 18.0 * cells * channels_in * channels_out


def _residuals(cells: int, channels_in: int, channels_out: int, count: int) -> float:
    """Residual blocks of two convolutions; the first changes the channels, with a product for its shortcut."""
    total = 0.0
    for _ in range(count):
        total += _convolution(cells, channels_in, channels_out) + _convolution(cells, channels_out, channels_out)
        total += 2.0 * cells * channels_in * channels_out * (channels_in != channels_out)
        channels_in = channels_out
    return total


def _middle(config: Config, cells: int) -> float:
    """Two residual blocks at the coarsest level, and attention between them where there is any."""
    channels = config["block_out_channels"][-1]
    total = _residuals(cells, channels, channels, 2)
    if config["mid_block_add_attention"]:
        total += 8.0 * cells * channels**2 + 4.0 * cells**2 * channels
    return total


def _matrix_weights(network: nn.Module) -> int:
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() for p in network.parameters() if p.ndim > 1 and id(p) not in embeddings)
