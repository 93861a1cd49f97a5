"""Z-Image goldens around the network: the autoencoder and pixels, and features of text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gesso.models.qwen_text import QwenText, build, is_left_out, plain_names
from gesso.pipelines.z_image import to_uint8
from gesso.weights.files import fill
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, SideCar
from tests.golden.z_image_network import autoencoder_of, by_recipe


def check_autoencoder(golden: Golden, comparison: Comparison) -> None:
    """Decoded latents, moments of pictures, and scaled latents to pixels."""
    autoencoder: Any = autoencoder_of(golden)
    atol = golden.tolerances.get("floats", default=1e-4)
    with torch.no_grad():
        measured: dict[str, Tensor] = {}
        if "z" in golden.tensors:
            measured["decoded"] = autoencoder.decode(golden.tensor("z"), return_dict=False)[0]
        if "image" in golden.tensors:
            measured["encoder_moments"] = autoencoder.encode(golden.tensor("image")).latent_dist.parameters
        if "post.latents" in golden.tensors:
            config = autoencoder.config
            unscaled = golden.tensor("post.latents") / config["scaling_factor"] + (config["shift_factor"] or 0.0)
            measured["post.decoded"] = autoencoder.decode(unscaled, return_dict=False)[0]
    for name, value in measured.items():
        if name in golden.tensors:
            comparison.close(name, value, golden.tensor(name), atol)
    if "post.uint8_nhwc" in golden.tensors and "post.decoded" in measured:
        pixels = golden.tolerances.get("uint8", default=1)
        recorded = golden.tensor("post.uint8_nhwc")
        comparison.close("post.uint8_nhwc", to_uint8(measured["post.decoded"]), recorded, pixels)


class TextSideCar(SideCar):
    config: dict[str, object]
    seed: int | None = None


def check_text(golden: Golden, comparison: Comparison) -> None:
    """Features of every row of tokens, together and one by one, without the last layer and the final norm."""
    from transformers import Qwen3Config

    side_car = golden.view(TextSideCar)
    config = Qwen3Config(**side_car.config)  # pyright: ignore[reportArgumentType]
    layers = config.num_hidden_layers
    network = build(config)
    stored = {name[2:]: value for name, value in golden.tensors.items() if name.startswith("w.")}
    if not stored and side_car.seed is None:
        raise BrokenGoldenError("side-car has neither weights nor the seed of their recipe")
    state = plain_names(stored) if stored else by_recipe(network, side_car.seed or 0)
    fill(network, {name: value for name, value in state.items() if not is_left_out(name, layers)}, golden.path.name)
    text = QwenText(network.eval(), None)
    ids = [row[kept.bool()].tolist() for row, kept in zip(golden.tensor("ids"), golden.tensor("mask"), strict=True)]
    atol = golden.tolerances.get("floats", default=5e-5)
    for index, features in enumerate(text.features_of_ids(ids)):
        recorded = golden.tensor(f"feats{index}")
        comparison.close(f"feats{index}", features, recorded, atol)
        comparison.close(f"feats{index} alone", text.features_of_ids([ids[index]])[0], recorded, atol)
