"""Pictures and captions of the user's own: found, checked, and cut to one size. Nothing is drawn or encoded here.

A folder has pictures, each with its caption in a text file of its name beside it (`star.png`, `star.txt`); or a file
has a JSON object a line, {"image": PATH, "caption": TEXT}, with paths from that file's folder, out of which none leads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from gesso.errors import FileError
from gesso.files import inside
from gesso.pictures import check_file, cover_crop, read_pixels
from gesso.training.lora.settings import LoraSettings
from gesso.training.pictures import to_tensor

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
_LONGEST_CAPTION = 1 << 14  # bytes
_LARGEST_LIST = 1 << 28  # bytes of a file of JSON lines
_NO_CAPTION = "set caption=TEXT to give all pictures one"


@dataclass(frozen=True)
class Example:
    """A picture and what is said of it; `digest` is that of the picture's file."""

    path: Path
    caption: str
    digest: str


def find_examples(settings: LoraSettings) -> list[Example]:
    """All pictures of the data in order, each read once to see that it can be, and is large enough.

    Raises FileError, which names the file, for the first thing that is wrong.
    """
    data = Path(settings.data).expanduser()
    found = list(_listed(data, settings.caption) if data.is_file() else _lying(data, settings.caption))
    if not found:
        raise FileError(data, "holds no pictures", "name a folder with pictures, or a file of JSON lines")
    if settings.held_out >= len(found):
        problem = f"holds {len(found)} pictures, of which held_out {settings.held_out} leaves none to learn"
        raise FileError(data, problem, "set held_out lower")
    return [Example(path, with_trigger(caption, settings.trigger), _digest(path)) for path, caption in found]


def check_sizes(examples: list[Example], width: int, height: int, most: float) -> None:
    """Refuse a picture that cannot be read, or that would be enlarged too much. Raises FileError."""
    for example in examples:
        picture = read_pixels(example.path)
        factor = max(width / picture.width, height / picture.height)
        if factor > most:
            problem = (
                f"has {picture.width}x{picture.height} pixels, which {width}x{height} would enlarge {factor:.1f} times"
            )
            raise FileError(example.path, problem, f"leave it out, or set most_enlarged={factor:.1f}")


def pixels(example: Example, width: int, height: int) -> Tensor:
    """The picture scaled and cut about its middle, `[1,3,H,W]` in [-1,1]."""
    return to_tensor(np.array(cover_crop(read_pixels(example.path), width, height, example.path))[None])


def with_trigger(caption: str, trigger: str) -> str:
    """A caption with the trigger before it, unless it has it.

    Example:
        >>> with_trigger("a red star", "chalk"), with_trigger("A chalk star", "chalk")
        ('chalk, a red star', 'A chalk star')
    """
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def _lying(folder: Path, caption: str) -> Iterator[tuple[Path, str]]:
    """Pictures of a folder by name, not of those within it."""
    if not folder.is_dir():
        raise FileError(folder, "no such folder or file", "name a folder with pictures, or a file of JSON lines")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICTURES and not path.name.startswith("."):
            yield inside(folder, path.name), caption or _beside(path)


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    try:
        if not text.is_file():
            raise FileError(path, f"has no caption beside it ({text.name})", _NO_CAPTION)
        written = inside(text.parent, text.name).read_bytes()
        if len(written) > _LONGEST_CAPTION:
            raise FileError(text, f"is longer than {_LONGEST_CAPTION} bytes", "shorten it")
        found = " ".join(written.decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(text, f"cannot be read as text ({error})", "write it in UTF-8") from error
    if not found:
        raise FileError(text, "is empty, where a caption is wanted", _NO_CAPTION)
    return found


def _listed(path: Path, caption: str) -> Iterator[tuple[Path, str]]:
    """Pictures of a file of JSON lines, in its order; lines without anything are passed over."""
    try:
        if path.stat().st_size > _LARGEST_LIST:
            raise FileError(path, f"is larger than {_LARGEST_LIST >> 20} MiB", "name a file of JSON lines")
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` also cuts within JSON, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read as text ({error})", "name a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _line(path, number, line, caption)


def _line(path: Path, number: int, line: str, caption: str) -> tuple[Path, str]:
    where, wanted = f"{path}, line {number}", 'write {"image": PATH, "caption": TEXT}'
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileError(where, "is no JSON", wanted) from error
    image = values.get("image") if isinstance(values, dict) else None
    if not isinstance(image, str) or not image:
        raise FileError(where, "names no image", wanted)
    said = caption or values.get("caption")
    if not isinstance(said, str) or not said.strip() or len(said) > _LONGEST_CAPTION:
        raise FileError(where, f"has no caption for {image}, or one that is too long", _NO_CAPTION)
    try:
        return inside(path.parent, image), " ".join(said.split())
    except FileError as error:
        raise FileError(where, error.problem, "put pictures below the file that lists them") from error


def _digest(path: Path) -> str:
    check_file(path)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror or error})") from error
