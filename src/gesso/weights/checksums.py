"""Lists of files with their MD5, as Z-Image's authors ship them, or SHA-256: read, written, held against a folder.

A line is "<32 or 64 hex digits> <path>", "<path> <digits>" or "<path>" alone; "#" begins a comment; lines of three
words or more are passed over, and told. MD5 tells damaged files from whole ones, and proves nothing about who made
them. Not here: the manifest of our own layout and of pulled models (`manifest`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gesso.errors import FileError
from gesso.files import inside

NAME = "manifest.txt"
SHIPPED = Path(__file__).parent / "lists"
"""Lists of published models, `<catalogue name>.txt`."""

Kind = Literal["md5", "sha256"]

_DIGEST = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{64}")
_MD5_DIGITS = 32
_WORDS_A_LINE = 2
_LARGEST = 1 << 20  # bytes of a list


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """Digests by path, None where only the file must be there; and lines that were passed over."""

    digests: Mapping[str, str | None]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Paths that are missing, those that are too short, and those whose content is another."""

    missing: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()

    @property
    def fine(self) -> bool:
        return not (self.missing or self.short or self.altered)


def parse(text: str) -> Checksums:
    """A list as it was written. A later line about the same path counts."""
    digests: dict[str, str | None] = {}
    skipped: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > _WORDS_A_LINE:
            skipped.append(line.strip())
        elif len(words) == 1:
            digests[words[0]] = None
        elif _DIGEST.fullmatch(words[0]):
            digests[words[1]] = words[0]
        else:
            digests[words[0]] = words[1]
    return Checksums(digests=digests, skipped=tuple(skipped))


def read(path: Path) -> Checksums:
    """A list from a file. Raises FileError where it cannot be read, or is no text."""
    try:
        if path.stat().st_size > _LARGEST:
            raise FileError(path, f"is larger than {_LARGEST} bytes, so it is no list of checksums")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    except UnicodeDecodeError as error:
        raise FileError(path, "is no text, so it is no list of checksums") from error


def write(digests: Mapping[str, str | None]) -> str:
    """The list as text, a file a line. Raises FileError for a path with blanks, which no line can hold."""
    for name in digests:
        if len(name.split()) != 1:
            raise FileError(name, "has blanks in its path, which a list of checksums cannot hold", "rename it")
    return "".join(f"{digits}  {name}\n" if digits else f"{name}\n" for name, digits in digests.items())


def make(folder: Path, files: Iterable[Path], kind: Kind = "md5") -> dict[str, str | None]:
    """Digests of files that lie in a folder, in order of path. Raises FileError."""
    return {path.relative_to(folder).as_posix(): digest(path, kind) for path in sorted(set(files))}


def check(folder: Path, listed: Checksums, *, contents: bool = True, case_matters: bool = False) -> Findings:
    """Hold a folder against a list; without `contents` files only have to be there.

    `case_matters` is how Z-Image's own code compares: digests in capitals then differ from the same in small letters.
    Raises FileError for a path that leads out of the folder, or a file that cannot be read.
    """
    missing, altered = [], []
    for name, wanted in listed.digests.items():
        path = inside(folder, name)
        if not path.is_file():
            missing.append(name)
        elif (
            contents
            and wanted is not None
            and digest(path, _kind(wanted)) != (wanted if case_matters else wanted.lower())
        ):
            altered.append(name)
    return Findings(missing=tuple(missing), altered=tuple(altered))


def digest(path: Path, kind: Kind = "md5") -> str:
    """Of a file, in small letters. Raises FileError."""
    try:
        with path.open("rb") as file:
            if kind == "md5":
                return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            return hashlib.file_digest(file, kind).hexdigest()
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error


def _kind(digits: str) -> Kind:
    return "md5" if len(digits) == _MD5_DIGITS else "sha256"
