"""What `gesso calibrate` measured of step caches: how it is stored, and which cache a wanted quality means.

One file a model, `GESSO_HOME/calibration/<model>.json`: a list of points, each one cache at a number of steps on a
machine. Quality is the mean structural similarity to the picture painted without a cache; `exact` is no cache at all.
Not here: measuring (`evaluation/caches`), caches (`caching`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gesso.cache_settings import CacheSettings, parse_cache
from gesso.errors import FileError, RequestError
from gesso.files import ready_folder, written_aside

SCHEMA = 1
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cache, measured.

    Attributes:
        cache: in the command line's spelling, blanks filled; "" is no cache with fewer steps.
        steps: of a picture.
        computed: how many of them were computed, on average.
        speed: seconds of the steps without a cache over those with it.
        psnr: decibels to the picture without a cache, the mean.
        ssim: structural similarity to it, the mean.
        latent: relative error of the latent before decoding, the mean.
        score: share of right pictures by the shapes world, None where it was not asked.
        score_without: that of the pictures without a cache.
        pictures: how many it was measured on.
        digest, device, dtype, hardware: of the weights and of the machine.
    """

    cache: str
    steps: int
    computed: float
    speed: float
    psnr: float
    ssim: float
    latent: float
    score: float | None
    score_without: float | None
    pictures: int
    digest: str
    device: str
    dtype: str
    hardware: str

    @property
    def settings(self) -> CacheSettings | None:
        """What to ask for; None for fewer steps without a cache."""
        return parse_cache(self.cache) if self.cache else None

    @property
    def drift(self) -> dict[str, float]:
        """What to expect of a picture, for its metadata."""
        return {"psnr": self.psnr, "ssim": self.ssim, "latent": self.latent}


def path_of(home: Path, model: str) -> Path:
    """Where a model's points lie. A path as a name becomes part of the file's name."""
    return home / "calibration" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')}.json"


def read_points(home: Path, model: str, digest: str | None = None) -> list[Point]:
    """A model's points, of these weights where `digest` is given; none if it was never calibrated.

    Raises FileError for a file that is no such list.
    """
    path = path_of(home, model)
    names = {field.name for field in fields(Point)}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA or any(set(row) != names for row in data["points"]):
            raise ValueError
        points = [Point(**row) for row in data["points"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = f"remove it, then: gesso calibrate {model}"
        raise FileError(path, "is no list of measured step caches", hint) from error
    return [point for point in points if digest is None or point.digest == digest]


def write_points(home: Path, model: str, points: Sequence[Point]) -> Path:
    """Keep a model's points in place of those that were there."""
    path = path_of(home, model)
    ready_folder(path.parent)
    with written_aside(path) as aside:
        rows = {"schema": SCHEMA, "points": [asdict(point) for point in points]}
        aside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both speed and similarity, the slowest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.speed, -one.ssim)):
        if not best or point.ssim > best[-1].ssim:
            best.append(point)
    return best[::-1]


def losing(point: Point, points: Sequence[Point]) -> bool:
    """Whether fewer steps without a cache, in the same time or less, come at least as close."""
    plain = [other for other in points if not other.cache and other.speed >= point.speed]
    return bool(point.cache) and any(other.ssim >= point.ssim for other in plain)


def pick(points: Sequence[Point], quality: str, *, model: str, steps: int) -> Point | None:
    """The fastest cache at so many steps whose similarity is at least `quality`; None for none that is faster.

    Raises RequestError for a quality that is no number from 0 to 1, and where nothing was measured at these steps.
    """
    least = parse_quality(quality)
    if least is None:
        return None
    fitting = caches_at(points, steps)
    if not fitting:
        measured = sorted({point.steps for point in points if point.cache})
        hint = f"first: gesso calibrate {model} --steps {steps}"
        hint += f"; or take {' or '.join(map(str, measured))} steps, which were measured" if measured else ""
        raise RequestError("quality", quality, f"known for {model} at {steps} steps", hint)
    within = [point for point in fitting if point.ssim >= least]
    return max(within, key=lambda point: point.speed, default=None)


def caches_at(points: Sequence[Point], steps: int) -> list[Point]:
    """What was measured of caches at so many steps, without those that forecast nothing there."""
    return [point for point in points if point.cache and point.steps == steps and point.computed < steps]


def parse_quality(text: str) -> float | None:
    """Least similarity; None for `exact`. Raises RequestError."""
    if text == EXACT:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # refuses NaN too
        raise RequestError("quality", text, f"a number from 0 to 1, or {EXACT}")
    return value


def expected(points: Sequence[Point], cache: CacheSettings, steps: int) -> dict[str, float] | None:
    """The drift that was measured of this very cache at so many steps; None if it never was."""
    found = next((point for point in points if point.settings == cache and point.steps == steps), None)
    return None if found is None else found.drift
