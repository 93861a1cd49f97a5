"""Questions of likeness to people whom training never saw: one portrait of each to paint from, another to know them by.

Here: who is asked for, the files that a request names, and how a painted picture is judged. Not here: painting.
Shapes: N trials, V numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gesso.files import written_aside
from gesso.models.face_recogniser import FaceRecogniser
from gesso.training.pictures import HELD_OUT_FROM, to_tensor
from gesso.worlds import faces

COMPANY = 20
"""People that a painted one is told from, itself among them."""
_APART = 2**32  # between the people of two seeds
_PICTURES = 3  # of a person: to paint from, to know by, and the one that is described
_CHUNK = 64


@dataclass(frozen=True)
class Trial:
    """One person: the portrait to paint from, another to know them by, and what the picture shall show.

    `drawn` is the portrait that `prompt` describes, as the world itself draws it.
    """

    reference: faces.Portrait
    known_by: faces.Portrait
    drawn: faces.Portrait
    prompt: str


def trials(count: int, seed: int = 0) -> list[Trial]:
    """Trials with people who are held out, the same for a seed everywhere. Those of seed 0 are `gesso eval faces`."""
    made = []
    for number in range(count):
        first = HELD_OUT_FROM * 2 + seed * _APART + number * _PICTURES
        person = faces.held_out_identity(first)
        reference, known_by, drawn = (faces.portrait_of(person, first + picture) for picture in range(_PICTURES))
        made.append(Trial(reference, known_by, drawn, faces.full_caption(drawn)))
    return made


def write_references(asked: Sequence[Trial], folder: Path, side: int) -> list[Path]:
    """Write the portraits to paint from as PNG files, for requests to name."""
    paths = [folder / f"person-{number:04d}.png" for number in range(len(asked))]
    for path, pixels in zip(paths, faces.draw([trial.reference for trial in asked], side), strict=True):
        with written_aside(path) as aside:
            Image.fromarray(pixels).save(aside, format="PNG")
    return paths


@torch.no_grad()
def cosines(recogniser: FaceRecogniser, asked: Sequence[Trial], pictures: Sequence[Image.Image]) -> Tensor:
    """Cosines `[N,20]` of each trial's picture with its own person (first) and with the next 19 trials' people."""
    side = recogniser.config.side
    known_NV = _vectors(recogniser, to_tensor(faces.draw([trial.known_by for trial in asked], side)))
    painted = [picture.convert("RGB").resize((side, side), Image.Resampling.BOX) for picture in pictures]
    painted_NV = _vectors(recogniser, to_tensor(np.stack([np.asarray(picture) for picture in painted])))
    columns = (torch.arange(len(asked))[:, None] + torch.arange(COMPANY)) % len(asked)
    return (painted_NV @ known_NV.T).gather(1, columns)


def drawings(asked: Sequence[Trial], side: int) -> list[Image.Image]:
    """What was asked for, as the world itself draws it."""
    return [Image.fromarray(pixels) for pixels in faces.draw([trial.drawn for trial in asked], side)]


def _vectors(recogniser: FaceRecogniser, image: Tensor) -> Tensor:
    return torch.cat([recogniser(chunk) for chunk in image.split(_CHUNK)])
