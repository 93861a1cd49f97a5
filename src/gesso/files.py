"""Writing files so that nothing is ever left half-written, under names that are free where no file may be replaced.

Here: write aside then rename, a check that a folder can be written to, numbered names. Not here: what is in the files.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
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
    with _aside(path) as aside:
        yield aside
        _settle(aside)
        aside.replace(path)


def written_under_free_name(path: Path, write: Callable[[Path], object]) -> Path:
    """Has a file written aside and gives it the first of "name.png", "name-2.png", "name-3.png", … that is free.

    No file is ever replaced, whatever other processes write to the same folder meanwhile.

    Args:
        path: the first name to try.
        write: is given a path beside it, with the same ending, and writes the whole file there.

    Returns:
        The name that the file got.

    Raises:
        FileError: the folder is missing or cannot be written to.
        RunError: the disk is full, or failed while writing.

    Example:
        >>> path = written_under_free_name(Path("/tmp/note.txt"), lambda aside: aside.write_text("mine"))
    """
    with _aside(path) as aside:
        try:
            write(aside)
        except FileError as error:  # the words are of the file that was asked for, not of the one beside it
            raise FileError(path if error.path == str(aside) else error.path, error.problem, error.hint) from error
        except RunError as error:
            raise RunError(error.message.replace(str(aside), str(path))) from error
        _settle(aside)
        numbered = (
            path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1)
        )
        return next(name for name in numbered if _moved_to_free(aside, name))


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


def _moved_to_free(aside: Path, name: Path) -> bool:
    """Give the file that name if it is free, of which no other process can be told the same; whether it was."""
    try:
        os.link(aside, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the name is taken by an empty file, which is then replaced
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            aside.replace(name)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    return True


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, gone after the block; what the system refuses in it becomes an error of ours."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".gesso-", suffix=path.suffix)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise RunError(f"{path}: {(error.strerror or str(error)).lower()}; nothing was left of it") from error
        raise _unwritable(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def _settle(aside: Path) -> None:
    """Make the file readable as others are, and put its bytes on the disk before a name points at them."""
    aside.chmod(0o666 & ~_umask())
    with aside.open("rb") as written:
        os.fsync(written.fileno())


def _unwritable(path: Path, error: OSError) -> FileError:
    reason = (error.strerror or str(error)).lower()
    return FileError(path, f"cannot be written to ({reason})", "choose another place with --output")


def _umask() -> int:
    """The process's file mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
