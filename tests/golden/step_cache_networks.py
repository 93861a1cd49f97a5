"""Networks of step-cache goldens, of whatever class a side-car names, and how each is called. Not here: the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of
from gesso.weights.files import fill
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden, NotYetError, SideCar, read_golden, view
from tests.golden.z_image_network import compare_names, network_config

_CLASSES = (
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanImageTransformer2DModel",
)


class NetworkSideCar(SideCar):
    """What tells a network."""

    model: str
    config: dict[str, Any]


class Weights(SideCar):
    """The golden that holds the weights."""

    model: str


@dataclass
class Subject:
    """A network, and the calls of one golden. `runs` is how many runs its samples are: packed samples are runs each."""

    network: nn.Module
    golden: Golden
    runs: int
    static: dict[str, Any]

    def __call__(self, step: int) -> Tensor:
        """The output at a recorded step's input."""
        given = _inputs(self.golden, f"in/{step:02}/")
        with torch.no_grad():
            if isinstance(self.network, S3DiT):
                return torch.stack(self.network(list(given["x"]), given["t"], self.static["company"]))
            return self.network(**self.static, **given, return_dict=False)[0]


def check_weights(golden: Golden, comparison: Comparison) -> None:
    """Stored weights: strictly the network's names and shapes."""
    network = _built(golden.view(NetworkSideCar))
    compare_names(comparison, network, {name: tuple(value.shape) for name, value in golden.tensors.items()})


def subject_of(golden: Golden) -> Subject:
    """The network that a golden names with its weights, and its constant arguments."""
    named = view(golden.data.get("weights") or {}, Weights, "weights.")
    source = read_golden(golden.path.with_name(f"{named.model}.json"))
    if source is None:
        raise BrokenGoldenError(f"weights.model: {named.model}.json is no side-car")
    network = _built(golden.view(NetworkSideCar))
    fill(network, dict(source.tensors), source.path.name)
    network.eval().requires_grad_(False)
    static = _inputs(golden, "in/static/")
    if isinstance(network, S3DiT):
        captions, latents = static["cap_feats"], golden.tensor("in/00/x")
        with torch.no_grad():
            contexts = network.read([Prompt([caption]) for caption in captions])
            static = {"company": network.join([size_of(latent) for latent in latents], contexts)}
        return Subject(network, golden, len(latents), static)
    shapes = golden.data.get("img_shapes")
    if isinstance(shapes, Sequence):
        static["img_shapes"] = [[tuple(shape) for shape in sample] for sample in shapes]
    return Subject(network, golden, 1, static)


def _inputs(golden: Golden, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in golden.tensors.items() if name.startswith(prefix)}


def _built(side_car: NetworkSideCar) -> nn.Module:
    """The network with any weights: not on the meta device, where tables that are no weights would be lost."""
    name = side_car.model.split()[0].rpartition(".")[2]
    if name == "ZImageTransformer2DModel":
        return S3DiT(network_config(side_car.config))
    if name not in _CLASSES:
        raise NotYetError(f"networks of class {name}")
    import diffusers

    return getattr(diffusers, name)(**side_car.config)
