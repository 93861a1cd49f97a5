"""What a file of weights is by its first bytes: the names and shapes of a safetensors file, or what it is instead.

No tensor is read and nothing is executed. Not here: which model names are of (`catalogue/foreign`), tensors (`files`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gesso.errors import FileError, GessoError, WeightsError

_LENGTH = 8  # bytes that say how long a safetensors header is
_LONGEST = 100_000_000  # bytes of a header, as the format has it
_FIRST = 512

# What files begin with that are no weights, or none that are read.
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: its dtype as the format spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def foreign_file(path: Path) -> FileError | None:
    """What a file that should be safetensors is instead; None for what may be safetensors, or was to be.

    Raises FileError for a file that cannot be read.
    """
    found = foreign(_read(path, _FIRST))
    return None if found is None else FileError(path, *found)


def foreign(first: bytes) -> tuple[str, str] | None:
    """What a file is that begins so and is no safetensors, in words that follow its name, and the way out."""
    start = first.lstrip().lower()
    again = "fetch it again"
    if first.startswith(_LFS):
        return "is a pointer of git-lfs, not the weights", f"run git lfs pull beside it, or {again}"
    if start.startswith(_PAGES):
        return "is a web page, as a download that wants a login leaves it, not weights", again
    # A safetensors file begins with the length of its header, which may look like a pickle's first bytes.
    if first.startswith((*_PICKLES, _ZIP)) and first[_LENGTH : _LENGTH + 1] != b"{":
        return "is a pickle, which may hold code; nothing was executed", "get the model as .safetensors"
    if first.startswith(b"GGUF"):
        return "is GGUF, which is not read", "get the model as .safetensors"
    if first.startswith((b"{", b"[")) and b"\0" not in first:
        return "is JSON, not weights", again
    return None


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of a safetensors file by name.

    Raises FileError for a file that is something else or cannot be read, WeightsError for one that is damaged.
    """
    if (problem := foreign_file(path)) is not None:
        raise problem
    length, size = int.from_bytes(_read(path, _LENGTH), "little"), path.stat().st_size
    if not 2 <= length <= min(_LONGEST, size - _LENGTH):
        raise WeightsError(path, detail=f"truncated, or not safetensors ({size} bytes)")
    try:
        found = json.loads(_read(path, _LENGTH + length)[_LENGTH:])
        found.pop("__metadata__", None)
        tensors = {str(name): _tensor(values) for name, values in found.items()}
        end = max((int(values["data_offsets"][1]) for values in found.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(path, detail="not safetensors, or its header is damaged") from error
    if (wanted := _LENGTH + length + end) != size:
        raise WeightsError(path, detail=f"truncated or altered: it has {size} bytes where its header says {wanted}")
    return tensors


def count_parameters(parts: Mapping[str, Path]) -> dict[str, int]:
    """Numbers in the tensors of each part, a safetensors file or a folder of them; what holds none is left out.

    What is damaged is left out too: loading it says so.
    """
    counts: dict[str, int] = {}
    for part, path in parts.items():
        with suppress(GessoError):
            count = sum(tensor.count for file in _files(path) for tensor in read_header(file).values())
            if count:
                counts[part] = count
    return counts


def _files(path: Path) -> list[Path]:
    """Safetensors of a part, those aside that are a variant of others beside them (model.fp16.safetensors)."""
    if not path.is_dir():
        return [path] if path.suffix == ".safetensors" and path.is_file() else []
    found = sorted(path.glob("*.safetensors"))
    return [file for file in found if "." not in file.stem] or found


def _tensor(values: dict[str, object]) -> TensorHeader:
    shape = values["shape"]
    if not isinstance(shape, list) or not all(isinstance(edge, int) and edge >= 0 for edge in shape):
        raise TypeError("shape")
    return TensorHeader(str(values["dtype"]), tuple(shape))


def _read(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error
