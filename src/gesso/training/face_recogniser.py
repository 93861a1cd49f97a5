"""The task of training a nano recogniser on the faces world: two pictures of one person near, of two people apart.

A batch is pairs: every picture must tell its partner from all others by a softmax over cosines, less a margin where it
is right (arXiv:1801.09414, with the batch's pictures for class centres, arXiv:1807.03748), so people are never
classes and strangers are known by the same rule. Beside that it learns where the key points are. Pictures are
softened and made noisy, for those that a model paints are. Not here: the loop, the network (`models/face_recogniser`).
Shapes: N people, B = 2N pictures in the order of people twice, V numbers of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gesso.models.face_recogniser import FaceRecogniserConfig, build
from gesso.training.export import save_model
from gesso.training.pictures import HELD_OUT_FROM, sheet, to_tensor
from gesso.training.settings import MOST_SCENES, check
from gesso.worlds import faces

_CHUNK = 64  # pictures at once where nothing is learned
_COMPANY = 20  # people that a held-out picture is told from, itself among them


@dataclass(frozen=True, kw_only=True)
class FaceRecogniserSettings:
    """`people` are known by `pictures` pictures each, drawn when they are first needed and then kept.

    `margin` is taken off the right cosine, `scale` is the softmax's. `blur` and `noise` are the most that a picture is
    softened (a share) and made noisy (a deviation, of 1 from grey to white).
    """

    network: FaceRecogniserConfig
    people: int = 1024
    pictures: int = 8
    scale: float = 16.0
    margin: float = 0.2
    points_weight: float = 20.0
    blur: float = 0.8
    noise: float = 0.1
    held_out: int = 200

    def __post_init__(self) -> None:
        check("people", self.people, 2 <= self.people <= MOST_SCENES, f"from 2 to {MOST_SCENES}")
        check("pictures", self.pictures, 2 <= self.pictures <= 1024, "from 2 to 1024")
        check("held_out", self.held_out, _COMPANY <= self.held_out <= MOST_SCENES, f"from {_COMPANY} to {MOST_SCENES}")
        check("scale", self.scale, math.isfinite(self.scale) and self.scale > 0, "a number above 0")
        check("margin", self.margin, 0 <= self.margin < 1, "from 0 to below 1")
        check("blur", self.blur, 0 <= self.blur <= 1, "from 0 to 1")
        for name in ("points_weight", "noise"):
            value = getattr(self, name)
            check(name, value, math.isfinite(value) and value >= 0, "a number from 0")


class FaceRecogniserTask:
    """Tell people apart."""

    def __init__(self, settings: FaceRecogniserSettings, batch: int, seed: int) -> None:
        check("batch", batch, batch >= 4 and batch % 2 == 0 and batch // 2 <= settings.people, "two for each person")
        torch.manual_seed(seed)
        self.settings, self.batch, self.seed = settings, batch, seed
        self.network = build(settings.network)
        self.album = Album(settings.people, settings.pictures, settings.network.side, seed * 2**33)

    def heavy_modules(self) -> list[nn.Module]:
        return [self.network]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The margin softmax over this step's pairs, and the squared error of key points in half sides."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        people = torch.randperm(settings.people, generator=generator)[: self.batch // 2]
        draws = torch.rand(len(people), settings.pictures, generator=generator).argsort(dim=1)[:, :2]
        image, points_B52 = self.album.pictures(people.repeat(2).tolist(), draws.T.flatten().tolist())
        vector_BV, found_B52 = self.network.vectors_and_points(self._spoilt(image, generator))
        apart = pair_softmax(vector_BV, settings.scale, settings.margin)
        misplaced = F.mse_loss(found_B52, points_B52) * 4
        figures = {"apart": apart.detach(), "misplaced": misplaced.detach()}
        return apart + settings.points_weight * misplaced, figures

    def evaluate(self) -> dict[str, float]:
        """Of people never seen: how often a picture is nearest to its person's other one, and by what cosines.

        `accuracy` is among 20 people, `accuracy_all` among all that are held out; `points_error` is in pixels.
        """
        first_NV, _, _ = self._held_out(0)
        second_NV, found_N52, points_N52 = self._held_out(1)
        cosines_NN = second_NV @ first_NV.T
        own_N = cosines_NN.diagonal()
        away = (found_N52 - points_N52).square().sum(-1).sqrt().mean() * self.settings.network.side
        return {
            "accuracy": accuracy(cosines_NN, _COMPANY),
            "accuracy_all": accuracy(cosines_NN, len(cosines_NN)),
            "same": float(own_N.mean()),
            "other": float((cosines_NN.sum() - own_N.sum()) / (cosines_NN.numel() - len(own_N))),
            "points_error": float(away),
        }

    def samples(self) -> Image.Image:
        """Rows: a held-out person, then the five pictures of held-out people that are most like it."""
        gallery, probes = self._held_out_pictures(1)[0], self._held_out_pictures(0)[0][:12]
        cosines = self._vectors(probes)[0] @ self._vectors(gallery)[0].T
        return sheet([[probe, *gallery[row.topk(5).indices]] for probe, row in zip(probes, cosines, strict=True)])

    def export(self, folder: Path, facts: Mapping[str, object]) -> None:
        config = {"family": "face-recogniser", "network": asdict(self.settings.network)}
        save_model(folder, {"recogniser": self.network.state_dict()}, config, facts)

    def _spoilt(self, image_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures a little softened and noisy, each by its own share."""
        size = (len(image_B3HW), 1, 1, 1)
        soft = F.avg_pool2d(F.pad(image_B3HW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        share = self.settings.blur * torch.rand(size, generator=generator)
        noise = self.settings.noise * torch.rand(size, generator=generator)
        return torch.lerp(image_B3HW, soft, share) + noise * torch.randn(image_B3HW.shape, generator=generator)

    def _held_out(self, picture: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, points as found and as they are, of one picture of every held-out person."""
        image, points = self._held_out_pictures(picture)
        vector, found = self._vectors(image)
        return vector, found, points

    def _held_out_pictures(self, picture: int) -> tuple[Tensor, Tensor]:
        people = [faces.held_out_identity(HELD_OUT_FROM + number) for number in range(self.settings.held_out)]
        portraits = [faces.portrait_of(who, HELD_OUT_FROM + 2 * i + picture) for i, who in enumerate(people)]
        points = np.stack([faces.key_points(portrait) for portrait in portraits])
        return to_tensor(faces.draw(portraits, self.settings.network.side)), torch.from_numpy(points).float()

    def _vectors(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.network.vectors_and_points(chunk) for chunk in image.split(_CHUNK)]
        vectors, points = (torch.cat(part) for part in zip(*found, strict=True))
        return vectors, points


class Album:
    """Some pictures of each of many people who are not held out, drawn when first asked for, with their key points."""

    def __init__(self, people: int, pictures: int, side: int, first_seed: int) -> None:
        self._first, self._each = first_seed, pictures
        self._known = np.zeros(people * pictures, dtype=bool)
        self._images = np.empty((people * pictures, side, side, 3), dtype=np.uint8)
        self._points = np.empty((people * pictures, 5, 2), dtype=np.float32)

    def pictures(self, people: list[int], pictures: list[int]) -> tuple[Tensor, Tensor]:
        """Pictures `[B,3,H,W]` in [-1,1] and key points `[B,5,2]`, by person and number of the picture."""
        places = [person * self._each + picture for person, picture in zip(people, pictures, strict=True)]
        for place in places:
            if not self._known[place]:
                who = faces.training_identity(self._first + place // self._each)
                portrait = faces.portrait_of(who, self._first + place)
                self._images[place] = faces.draw([portrait], self._images.shape[1])[0]
                self._points[place] = faces.key_points(portrait)
                self._known[place] = True
        return to_tensor(self._images[places]), torch.from_numpy(self._points[places])


def pair_softmax(vector_BV: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy of every vector finding its partner, half a batch away, among all others of the batch."""
    count = len(vector_BV)
    partner_B = (torch.arange(count) + count // 2) % count
    cosines_BB = vector_BV @ vector_BV.T - margin * F.one_hot(partner_B, count)
    cosines_BB = cosines_BB.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scale * cosines_BB, partner_B)


def accuracy(cosines_NN: Tensor, company: int) -> float:
    """Share of rows whose own column is nearest among `company`: itself and those after it, in a ring."""
    count = len(cosines_NN)
    columns = (torch.arange(count)[:, None] + torch.arange(company)) % count
    return float((cosines_NN.gather(1, columns).argmax(dim=1) == 0).float().mean())
