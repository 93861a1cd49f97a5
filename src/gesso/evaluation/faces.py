"""Likeness-score of a model on the faces world: people training never saw, painted from one portrait and told apart.

Here: painting the trials through the engine, and counting. A picture is right if, of twenty people's other portraits,
its own person's is the most like it, by a recogniser; chance is 1 in 20. Not here: who is asked for
(`training/people`), the recogniser, and printing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gesso.engine import Engine
from gesso.errors import FileError, RequestError
from gesso.evaluation.shapes import Share
from gesso.request import GenerationRequest, parse_request

if TYPE_CHECKING:
    from PIL import Image

    from gesso.models.face_recogniser import FaceRecogniser

COMPANY = 20
MOST_TRIALS = 10_000
_SIDE = 64
_TOGETHER = 40  # requests handed to the engine at once
_SET_HERE = ("prompt", "seed", "identity", "num_images")


@dataclass(frozen=True, kw_only=True)
class LikenessAnswer:
    """One picture: what was asked, its cosine to its own person, and to the nearest of the nineteen others."""

    prompt: str
    seed: int
    own: float
    nearest_other: float

    @property
    def right(self) -> bool:
        return self.own > self.nearest_other


@dataclass(frozen=True, kw_only=True)
class FacesScore:
    """The score of one model.

    Attributes:
        request: the fields every trial was painted with.
        digest: of the weights.
        painted: how many people are known again in the model's pictures.
        drawn: the same of the world's own pictures of what was asked: what the recogniser allows.
        own, others: mean cosines to the right person and to the others.
        seconds: of painting and judging.
        answers: every picture's.
    """

    request: dict[str, object]
    digest: str
    painted: Share
    drawn: Share
    own: float
    others: float
    seconds: float
    answers: tuple[LikenessAnswer, ...]

    @property
    def chance(self) -> float:
        """The share of right ones that guessing has."""
        return 1 / COMPANY

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: the score first, then every answer."""
        shares = {"painted": self.painted, "drawn": self.drawn}
        return {
            "score": "faces",
            **{
                name: {"share": share.value, "right": share.right, "asked": share.asked, "interval": share.interval}
                for name, share in shares.items()
            },
            "chance": self.chance,
            "own": self.own,
            "others": self.others,
            "request": self.request,
            "digest": self.digest,
            "seconds": self.seconds,
            "answers": [asdict(answer) | {"right": answer.right} for answer in self.answers],
        }


def evaluate(
    engine: Engine,
    recogniser: FaceRecogniser,
    fields: Mapping[str, object] | None = None,
    *,
    trials: int = 200,
    seed: int = 0,
    identity: Mapping[str, object] | None = None,
    report: Callable[[int], None] | None = None,
) -> FacesScore:
    """Paints people whom training never saw, each from one portrait, and tells them from nineteen others.

    Args:
        engine: paints.
        recogniser: knows people again. The model's own flatters it; one of another seed says more.
        fields: fields of `GenerationRequest` for every trial (model, guidance, steps, …).
        trials: how many.
        seed: of the trials; trial i is painted with seed + i.
        identity: fields of the request's identity besides the portrait (strength, start, end).
        report: called with the number of pictures there are.

    Raises:
        RequestError: a field cannot be used, or the number of trials is out of range.
        FileError: the model paints nobody.
        GessoError: whatever made the painting fail.
    """
    from gesso.training import people

    check_trials(trials)
    settings = {name: value for name, value in (fields or {}).items() if name not in _SET_HERE}
    started = time.perf_counter()
    asked = people.trials(trials, seed)
    with tempfile.TemporaryDirectory(prefix="gesso-") as folder:
        paths = people.write_references(asked, Path(folder), _SIDE)
        requests = [
            parse_request(
                {"safety": "off", **settings, "prompt": trial.prompt, "seed": seed + number}
                | {"identity": {**(identity or {}), "image": str(path)}}
            )
            for number, (trial, path) in enumerate(zip(asked, paths, strict=True))
        ]
        pictures, digest = _painted(engine, requests, report)
    painted_NK = people.cosines(recogniser, asked, pictures)
    drawn_NK = people.cosines(recogniser, asked, people.drawings(asked, _SIDE))
    answers = tuple(
        LikenessAnswer(prompt=trial.prompt, seed=seed + number, own=row[0], nearest_other=max(row[1:]))
        for number, (trial, row) in enumerate(zip(asked, painted_NK.tolist(), strict=True))
    )
    return FacesScore(
        request=settings | {"trials": trials, "seed": seed} | _how(requests[0]),
        digest=digest,
        painted=Share(right=sum(answer.right for answer in answers), asked=trials),
        drawn=Share(right=int((drawn_NK.argmax(dim=1) == 0).sum()), asked=trials),
        own=float(painted_NK[:, 0].mean()),
        others=float(painted_NK[:, 1:].mean()),
        seconds=time.perf_counter() - started,
        answers=answers,
    )


def _painted(
    engine: Engine, requests: list[GenerationRequest], report: Callable[[int], None] | None
) -> tuple[list[Image.Image], str]:
    """A picture of each request, in order, and the digest of the weights that painted them."""
    pictures: list[Image.Image] = []
    digest = ""
    for first in range(0, len(requests), _TOGETHER):
        for result in engine.run(requests[first : first + _TOGETHER]):
            model = result.metadata.get("model")
            digest = str(model.get("digest", "")) if isinstance(model, dict) else ""
            pictures.append(result.image)
            if report is not None:
                report(len(pictures))
    return pictures, digest


def _how(request: GenerationRequest) -> dict[str, object]:
    """What was said of the person besides the portrait."""
    said = request.identity.model_dump(exclude={"image"}, exclude_none=True) if request.identity else {}
    return {"identity": said} if said else {}


def check_trials(count: int) -> None:
    """Refuses a number of trials that leaves too few people to be told from, or is beyond reason."""
    if not COMPANY <= count <= MOST_TRIALS:
        raise RequestError("trials", count, f"a whole number from {COMPANY} to {MOST_TRIALS}")


def recogniser_of(folder: Path) -> FaceRecogniser:
    """The recogniser in a folder: a model's that paints people, or one alone. Raises FileError, WeightsError."""
    from gesso.weights.configuration import read_config
    from gesso.weights.face_recogniser import load_recogniser

    config = read_config(folder)
    if "recogniser" not in config and config.get("family") != "face-recogniser":
        raise FileError(folder, "holds no recogniser of the faces world", "name a model that gesso train made")
    return load_recogniser(folder)
