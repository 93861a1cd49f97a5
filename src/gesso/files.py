"""Writing files so that nothing is ever left half-written, and finding names that are free.

Here: write aside then rename, a check that a folder can be written to, numbered names. Not here: what is in the files.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gesso.errors import FileError, RunError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed onto it if the block succeeds, removed if it does not.

    An existing `path` is replaced at once and as a whole.

    Raises:
        FileError: the folder is missing or cannot be written to.
        RunError: the disk is full, or failed while the block was writing.

    Example:
        >>> with written_aside(Path("/tmp/note.txt")) as aside:
        ...     _ = aside.write_text("whole, or not at all")
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".gesso-", suffix=path.suffix)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())
        with aside.open("rb") as written:  # the bytes must be on the disk before the name points at them
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise RunError(f"{path}: {(error.strerror or str(error)).lower()}; nothing was left of it") from error
        raise _unwritable(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def ready_folder(path: Path) -> Path:
    """Makes the folder where it is missing and proves, by writing, that files can be made in it.

    Raises:
        FileError: it is a file, cannot be made or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".gesso-"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def inside(folder: Path, name: str) -> Path:
    """The file of that name below a folder: the one guard against names that lead out of it.

    Raises:
        FileError: the name is absolute, or climbs out of the folder by itself or by a link.
    """
    path = folder / name
    try:
        path.resolve().relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError) as error:
        raise FileError(folder, f"is asked for {name}, which does not lie in it") from error
    return path


def free_name(path: Path) -> Path:
    """`path` if nothing is there, else the first of "name-2.png", "name-3.png", … that is free."""
    candidate, number = path, 1
    while candidate.exists() or candidate.is_symlink():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _unwritable(path: Path, error: OSError) -> FileError:
    reason = (error.strerror or str(error)).lower()
    return FileError(path, f"cannot be written to ({reason})", "choose another place with --output")


def _umask() -> int:
    """The process's file mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
