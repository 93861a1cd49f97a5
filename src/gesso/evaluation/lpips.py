"""LPIPS, how alike two pictures are to a network that has seen many: 0 for equal ones.

Zhang and others, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv:1801.03924), version
0.1 with AlexNet. Its weights are not fetched: where both files lie in `GESSO_HOME/weights/lpips` they are used.
Not here: which pictures are compared (`caches`), other distances (`closeness`).
Shapes: B pictures, 3 colours, H W pixels, C channels, h w cells of a layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.evaluation.closeness import pixels
from gesso.weights.files import fill, read_tensors

FEATURES, LAYERS = "alexnet-owt-7be5be79.pth", "alex.pth"
"""AlexNet's weights as torchvision publishes them, and what LPIPS's authors learned of its layers (v0.1)."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_SMALL = 1e-10
_LEAST_SIDE = 35  # pixels, of which the last layer still sees one cell


class Lpips(nn.Module):
    """Five layers of AlexNet, their features of unit length, and a weight for each channel's squared difference."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.weights = nn.ModuleList([nn.Conv2d(width, 1, 1, bias=False) for width in (64, 192, 384, 256, 256)])

    def forward(self, picture_B3HW: Tensor, other_B3HW: Tensor) -> Tensor:
        """The distance of each pair, `[B]`; pixels from -1 to 1, at least 35 by 35 (equation 1 of the paper)."""
        pairs = zip(self._features(picture_B3HW), self._features(other_B3HW), self.weights, strict=True)
        return torch.stack(
            [weights((one_BChw - other_BChw).square()).mean((1, 2, 3)) for one_BChw, other_BChw, weights in pairs]
        ).sum(0)

    def _features(self, picture_B3HW: Tensor) -> list[Tensor]:
        """Those of each layer, `[B,C,h,w]`, of unit length in every cell."""
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x_BChw, found = (picture_B3HW - shift) / scale, []
        for number, convolution in enumerate(self.convolutions):
            if number in (1, 2):
                x_BChw = F.max_pool2d(x_BChw, 3, stride=2)
            x_BChw = F.relu(convolution(x_BChw))
            found.append(x_BChw / (x_BChw.norm(dim=1, keepdim=True) + _SMALL))
        return found


def load_lpips(home: Path) -> Lpips | None:
    """The network, where its weights lie in the home folder; else None.

    Raises WeightsError for files that are damaged or hold something else.
    """
    folder = home / "weights" / "lpips"
    if not all((folder / name).is_file() for name in (FEATURES, LAYERS)):
        return None
    network, state = Lpips(), {}
    published = read_tensors(folder / FEATURES, pickles=True)
    for ours, theirs in enumerate((0, 3, 6, 8, 10)):  # places among torchvision's layers
        for name in ("weight", "bias"):
            if (value := published.get(f"features.{theirs}.{name}")) is not None:
                state[f"convolutions.{ours}.{name}"] = value
    for name, value in read_tensors(folder / LAYERS, pickles=True).items():
        state[name.replace("lin", "weights.").replace(".model.1.", ".")] = value
    fill(network, state, folder)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def lpips(network: Lpips, picture: Image.Image, other: Image.Image) -> float:
    """The distance of two pictures of the same size; smaller ones than 35 pixels are enlarged for it."""
    both = torch.stack([pixels(picture), pixels(other)]).float() / 127.5 - 1
    if min(both.shape[-2:]) < _LEAST_SIDE:
        both = F.interpolate(both, size=[max(side, _LEAST_SIDE) for side in both.shape[-2:]], mode="bilinear")
    return float(network(both[:1], both[1:]))
