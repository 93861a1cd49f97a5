"""Calls of the C library about memory: freed memory goes back to the system, and pages of files are brought in.

They are glibc's and Linux's; elsewhere nothing is done. Not here: memory of GPUs (`engine/device`).
"""

import contextlib
import ctypes
import mmap
import platform
from functools import cache

_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
_POPULATE_READ = 22  # madvise's MADV_POPULATE_READ, from Linux 5.14 on; before, the call does nothing
_LARGE = 1 << 20  # bytes of a block that goes back when it is freed


def give_back() -> None:
    """Return what is free now, in milliseconds: large blocks that come and go leave holes that are not used again."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def keep_nothing() -> None:
    """Have every large block go back as it is freed, for the rest of the process.

    Otherwise blocks of up to 32 MiB are kept, and a picture may take half as much again beside weights. A block that
    went back has to be cleared anew, which takes up to a third of the time of decoding at small sizes.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


def bring_in(address: int, size: int) -> None:
    """Have the pages of a mapped file read now and in one go, other threads running; else each is when it is used."""
    if (library := _glibc()) is not None and size:
        before = address - address % mmap.PAGESIZE
        library.madvise(ctypes.c_void_p(before), ctypes.c_size_t(address + size - before), _POPULATE_READ)


@cache
def _glibc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, AttributeError):
        if platform.libc_ver()[0] == "glibc":
            return ctypes.CDLL(None)
    return None
