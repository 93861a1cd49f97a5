"""What `gesso calibrate` measured of step caches: how it is stored, and which cache a wanted quality means.

One file a model, `GESSO_HOME/calibration/<model>.json`: a list of points, each one cache at a number of steps, of some
weights on some machine. Quality is the mean structural similarity to the picture painted without a cache; `exact` is no
cache at all. Not here: measuring (`evaluation/caches`), caches (`caching`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from gesso.cache_settings import CacheSettings, parse_cache
from gesso.errors import FileError, RequestError
from gesso.files import ready_folder, written_aside

if TYPE_CHECKING:
    from gesso.request import GenerationRequest

SCHEMA = 1
EXACT = "exact"
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_VALUES = (
    "scheduler",
    "guidance",
    "true_guidance",
    "guidance_normalization",
    "guidance_truncation",
    "frames",
    "init_strength",
)
_GIVEN = ("init_image", "mask", "identity", "lora")
"""Fields that change how far a cache's picture drifts: told with their value, and told that they are there."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cache, measured.

    Attributes:
        cache: in the command line's spelling, blanks filled; "" is no cache with fewer steps.
        steps: of a picture.
        reference: of the picture without a cache that it is held against, which speed and likeness are relative to.
        painted: what else the pictures were painted with, see `painted_with`; empty in lists that did not note it.
        computed: how many of them were computed, on average.
        speed: seconds of the steps without a cache over those with it.
        psnr: decibels to the picture without a cache, the mean.
        ssim: structural similarity to it, the mean.
        latent: relative error of the latent before decoding, the mean.
        lpips: distance to it as a network sees them, the mean; None where that network was not there.
        score: share of right pictures by the shapes world, None where it was not asked.
        score_without: that of the pictures without a cache.
        pictures: how many it was measured on.
        digest, device, dtype, hardware: of the weights and of the machine.
    """

    cache: str
    steps: int
    reference: int
    painted: tuple[str, ...] = ()
    computed: float
    speed: float
    psnr: float
    ssim: float
    latent: float
    lpips: float | None = None
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
        found = {"psnr": self.psnr, "ssim": self.ssim, "latent": self.latent}
        return found if self.lpips is None else found | {"lpips": self.lpips}


_POINTS = TypeAdapter(list[Point])


def path_of(home: Path, model: str) -> Path:
    """Where a model's points lie. One that is named by a path has a file by its place, whatever way leads there; a name
    without a separator is one of the catalogue.
    """
    if _PLAIN.fullmatch(model):
        return home / "calibration" / f"{model}.json"
    place = Path(model).expanduser().resolve()
    last, digest = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name), hashlib.sha256(str(place).encode()).hexdigest()
    return home / "calibration" / f"{last}-{digest[:8]}.json"


def read_points(home: Path, model: str, digest: str | None = None) -> list[Point]:
    """A model's points, of these weights where `digest` is given; none if it was never calibrated.

    Raises FileError for a file that is no such list.
    """
    path = path_of(home, model)
    names = {field.name for field in fields(Point)}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = _with_references(data["points"])
        if data["schema"] != SCHEMA or any({"lpips", "painted", *row} != names for row in rows):
            raise ValueError
        points = _POINTS.validate_python(rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        hint = f"remove it, then: gesso calibrate {model}"
        raise FileError(path, "is no list of measured step caches", hint) from error
    return [point for point in points if digest is None or point.digest == digest]


def _with_references(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of lists that did not note what was held against: a cache's was of its own steps; that of fewer plain steps
    is not known, so these are left out, to be measured again.
    """
    known = [row for row in rows if "reference" in row or row["cache"]]
    return [{"reference": row["steps"], **row} for row in known]


def keep_point(home: Path, model: str, point: Point) -> Path:
    """Add a point to a model's, in place of an older one of the same. Other processes may do so at the same time."""
    from filelock import FileLock  # comes with torch

    path = path_of(home, model)
    with FileLock(ready_folder(path.parent / ".locks") / f"{path.name}.lock"):
        rows = {"schema": SCHEMA, "points": [asdict(one) for one in with_point(read_points(home, model), point)]}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def with_point(points: Sequence[Point], new: Point) -> list[Point]:
    """All of them, the new one in place of an older one of the same cache, steps, reference, weights and machine."""

    def key(point: Point) -> tuple[object, ...]:
        machine = (point.device, point.dtype, point.hardware)
        return point.cache, point.steps, point.reference, point.digest, *machine

    return [*(point for point in points if key(point) != key(new)), new]


def alike(points: Sequence[Point], known: Mapping[str, str]) -> list[Point]:
    """Those of these weights on this machine: `known` are fields of a point with their values."""
    return [point for point in points if all(getattr(point, name) == value for name, value in known.items())]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both speed and similarity, the slowest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.speed, -one.ssim)):
        if not best or point.ssim > best[-1].ssim:
            best.append(point)
    return best[::-1]


def losing(point: Point, points: Sequence[Point]) -> bool:
    """Whether fewer steps without a cache, in the same time or less, come at least as close."""
    beside = [other for other in points if (other.reference, other.painted) == (point.reference, point.painted)]
    plain = [other for other in beside if not other.cache and other.speed >= point.speed]
    return bool(point.cache) and any(other.ssim >= point.ssim for other in plain)


def pick(points: Sequence[Point], quality: str, *, model: str, steps: int, asked: int | None = None) -> Point | None:
    """The fastest cache at so many steps whose similarity is at least `quality`; None where none of them is faster than
    no cache. `asked` are the steps that were asked for, where a given picture leaves fewer.

    Raises RequestError for a quality that is no number from 0 to 1, and where nothing was measured at these steps.
    """
    least = parse_quality(quality)
    if least is None:
        return None
    fitting = caches_at(points, steps)
    if not fitting:
        measured = sorted({point.steps for point in points if point.cache})
        hint = f"first: gesso calibrate {model} --steps {steps}"
        if measured and asked in (None, steps):
            hint += f"; or take {' or '.join(map(str, measured))} steps, which were measured"
        raise RequestError("quality", quality, f"known for {model} at {steps} steps", hint)
    within = [point for point in fitting if point.ssim >= least and point.speed > 1]
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


def measured(points: Sequence[Point], cache: CacheSettings, steps: int) -> list[Point]:
    """What was measured of this very cache at so many steps, whatever else the pictures were painted with."""
    return [point for point in points if point.settings == cache and point.steps == steps]


def expected(points: Sequence[Point], request: GenerationRequest, steps: int) -> dict[str, float] | None:
    """The drift that was measured of a planned request's cache at so many steps; None where it never was, or only of
    pictures that were painted with something else.
    """
    if request.cache is None:
        return None
    painted = painted_with(request)
    found = (point for point in measured(points, request.cache, steps) if point.painted == painted)
    point = next(found, None)
    return None if point is None else point.drift


def painted_with(request: GenerationRequest) -> tuple[str, ...]:
    """What a planned request has, besides its cache and steps, that changes how far a cache's picture drifts."""
    found = [f"{request.width}x{request.height}"]
    for name in _VALUES:
        value = getattr(request, name)
        if isinstance(value, tuple):
            found.append(f"{name} by step")
        elif value is not None:
            found.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return (*found, *(name for name in _GIVEN if getattr(request, name)))


def unlike(point: Point, request: GenerationRequest) -> str:
    """What sets a planned request apart from the pictures that a point was measured on, in words; empty for nothing."""
    painted = painted_with(request)
    if point.painted == painted:
        return ""
    had = ", ".join(point.painted) or "settings that were not noted"
    has = ", ".join(one for one in painted if one not in point.painted) or "fewer"
    return f"measured with {had}; this request has {has}"
