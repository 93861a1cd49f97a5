"""One safetensors file out of a tar, as Replicate's trainers leave it: read by name, never unpacked.

No name in an archive becomes a path, no link is followed, and what is read is bounded, headers too. Not here: what the
file holds (`formats`), zip archives, which are what pickles come in.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

from gesso.adapters.sources_sites import shown_name
from gesso.errors import RunError
from gesso.weights.hub import amount

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError)
_GZIP = b"\x1f\x8b"
_MAGIC = slice(257, 262)  # where a tar says that it is one
_MOST_MEMBERS = 10_000
_LARGEST_READ = 1 << 20  # bytes that a header may make anybody read at once
_BLOCK = 1 << 20
_SHOWN = 8
_WORDS = ("embeddings.pti", "special_params.json")  # words that cog-sdxl trains, and what they are called in prompts
_WEIGHTS = ".safetensors"


def is_archive(path: Path) -> bool:
    """Whether the file is a tar, packed by gzip or not."""
    with path.open("rb") as file:
        first = file.read(512)
    return first.startswith(_GZIP) or first[_MAGIC] == b"ustar"


class Extracted(NamedTuple):
    """A member's name as it may be shown, and those beside it that hold trained words, which are not read."""

    name: str
    words: tuple[str, ...]


def extract(archive: Path, member: str, target: Path, *, name: str, limit: int) -> Extracted:
    """Copy one safetensors file of an archive to `target`.

    Args:
        archive: a tar.
        member: the file's name in it, or the end of it from a "/" on; "" for the only one.
        target: is written to.
        name: of the archive, for errors.
        limit: bytes that the file, and all that has to be unpacked for it, may have.

    Raises:
        RunError: no such file, several, something else than a file, larger than the limit, or a damaged archive.
        OSError: the disk.
    """
    plain = archive.with_suffix(".tar")
    try:
        with archive.open("rb") as file:
            packed = file.read(2) == _GZIP
        if packed:
            _unpack(archive, plain, name, limit)
        with (plain if packed else archive).open("rb") as file:
            return _copy(_Careful(file), member, target, name, limit)
    except _DAMAGE as error:
        raise RunError(f"{name} is a damaged archive") from error
    finally:
        plain.unlink(missing_ok=True)


class _Careful:
    """A file that refuses to be read in large pieces: a header of a tar may ask for as much as it likes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise tarfile.ReadError("a header that is too large")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _unpack(archive: Path, plain: Path, name: str, limit: int) -> None:
    with gzip.open(archive) as packed, plain.open("wb") as file:
        while block := packed.read(_BLOCK):
            if file.tell() + len(block) > limit:
                raise RunError(f"{name} unpacks to more than the limit of {amount(limit)}")
            file.write(block)


def _copy(file: _Careful, member: str, target: Path, name: str, limit: int) -> Extracted:
    found: list[tarfile.TarInfo] = []
    beside: set[str] = set()
    with tarfile.open(fileobj=file, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for count, entry in enumerate(tar):
            if count >= _MOST_MEMBERS:
                raise RunError(f"{name} has more than {_MOST_MEMBERS} files")
            beside.add(entry.name.rpartition("/")[2])
            plain = entry.isreg() and not entry.issparse() and entry.name.lower().endswith(_WEIGHTS)
            if plain and f"/{entry.name}".endswith(f"/{member}" if member else ""):
                found.append(entry)
        if len(found) != 1:
            names = ", ".join(shown_name(entry.name) for entry in found[:_SHOWN])
            wanted = f"file {member}" if member else f"{_WEIGHTS} file"
            raise RunError(f"{name} has {f'several: {names}; name one' if found else f'no {wanted}'}")
        if found[0].size > limit:
            raise RunError(f"{name} holds a file of {amount(found[0].size)}, more than the limit of {amount(limit)}")
        reader = tar.extractfile(found[0])
        assert reader is not None
        with reader, target.open("wb") as copy:
            shutil.copyfileobj(reader, copy, _BLOCK)
            if copy.tell() != found[0].size:
                raise RunError(f"{name} is a damaged archive")
        return Extracted(shown_name(found[0].name), tuple(word for word in _WORDS if word in beside))
