"""Tensors that lie in safetensors files: where each one's bytes are, stand-ins until they are wanted, and reading them.

While a model is put together inside `deferred()`, loaders that ask for it fill their networks with stand-ins: tensors
of the right shape, dtype and device that take the memory of one number. `engine/loading/build.py` then decides how the
real ones lie in memory (`weights/residency`). A stand-in holds NaN, so that nothing painted with one passes for a
picture. Not here: which files a model has, strictness (`weights/files`).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gesso import allocator
from gesso.devices import CPU, kind_of
from gesso.errors import WeightsError

ALIGNMENT = 64
"""Bytes to which tensors are aligned in an arena, as PyTorch aligns its own: kernels then do the same sums."""

_AT_ONCE = 1 << 26  # bytes of one read
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class File:
    """A file that is held open while tensors in it may be wanted; that it changes meanwhile is noticed.

    Raises WeightsError where it cannot be opened.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        except OSError as error:
            raise WeightsError(path, detail=f"cannot be read ({(error.strerror or str(error)).lower()})") from error
        self.path = path
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self._before = self._mark() if descriptor is None else None

    def _mark(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise WeightsError if the file was written to since it was opened."""
        if self._before is not None and self._mark() != self._before:
            raise WeightsError(self.path, detail="was altered while it was in use; load the model again")

    def map(self, start: int, end: int) -> tuple[mmap.mmap, int]:
        """These bytes as memory, which nothing is read into before it is touched; and from where its first byte is.

        It may be written to, which the file does not see. Raises WeightsError where the file ends before.
        """
        before = start - start % mmap.ALLOCATIONGRANULARITY
        if os.fstat(self.descriptor).st_size < end:
            raise WeightsError(self.path, detail="truncated")
        return mmap.mmap(self.descriptor, end - before, access=mmap.ACCESS_COPY, offset=before), before

    def read(self, target: memoryview, offset: int) -> None:
        """Fill bytes from that place. Raises WeightsError where the file ends before."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.descriptor, [target[done : done + _AT_ONCE]], offset + done)
            except OSError as error:
                raise WeightsError(self.path, detail=f"cannot be read ({error.strerror})") from error
            if not count:
                raise WeightsError(self.path, detail="truncated")
            done += count


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are, what they are, and the dtype in which they are wanted.

    `axes` says in which order its axes are wanted, where that is not the order of memory.
    """

    file: File
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wanted: torch.dtype
    axes: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return _count(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def nbytes(self) -> int:
        """Bytes in memory, once cast."""
        return _count(self.shape) * self.wanted.itemsize

    def turned(self, tensor: Tensor) -> Tensor:
        """What was read, its axes as they are wanted."""
        return tensor.permute(self.axes) if self.axes else tensor

    def cast_to(self, dtype: torch.dtype | None) -> Stored:
        """The same, wanted in another dtype if it is a floating-point number."""
        return self if dtype is None or not self.dtype.is_floating_point else replace(self, wanted=dtype)


class Arena:
    """Memory for tensors that come and go together: it goes back to the system as soon as the last of them does.

    What `malloc` frees may stay with the process, and would count against it.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, max(size, 1))
        self._used = 0

    @staticmethod
    def room(sizes: Iterable[int]) -> int:
        """Bytes that tensors of these sizes take in one arena."""
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """The next tensor, and its bytes."""
        size, start = _count(shape) * dtype.itemsize, self._used
        self._used += self.room([size])
        if not size:
            return torch.empty(shape, dtype=dtype), memoryview(b"")
        flat = torch.frombuffer(self._memory, dtype=dtype, count=_count(shape), offset=start)
        return flat.view(shape), memoryview(self._memory)[start : start + size]


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, in the order of its bytes. Reads nothing but the header.

    Raises WeightsError for a file that is truncated or something else.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # checks lengths, offsets and names
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        file, start = File(path), 8 + length
        found = {name: _entry(file, start, entry) for name, entry in header.items() if name != "__metadata__"}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(path, detail=f"truncated or not safetensors ({error})") from error
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _entry(file: File, start: int, entry: dict[str, object]) -> Stored:
    kind = str(entry["dtype"])
    if kind not in _DTYPES:
        raise ValueError(f"numbers of the kind {kind} are not read")
    shape, offsets = entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list) and isinstance(offsets, list)  # checked by safetensors
    return Stored(file, start + offsets[0], tuple(shape), _DTYPES[kind], _DTYPES[kind])


def mapped(tensors: Iterable[Stored]) -> list[Tensor]:
    """Tensors on the CPU, cast as they are wanted, without a copy of those that need no cast: pages of their files.

    They lie at the same places within a page as in the file, whoever maps them. Raises WeightsError.
    """
    wanted = list(tensors)
    found: dict[int, Tensor] = {}
    for file in {each.file for each in wanted}:
        file.check()
        plain = [index for index, each in enumerate(wanted) if each.file is file and _is_mappable(each)]
        if not plain:
            continue
        memory, start = file.map(min(wanted[i].offset for i in plain), max(wanted[i].end for i in plain))
        for index in sorted(plain, key=lambda index: wanted[index].offset):
            each = wanted[index]
            count, offset = each.size // each.dtype.itemsize, each.offset - start
            flat = torch.frombuffer(memory, dtype=each.dtype, count=count, offset=offset)
            allocator.bring_in(flat.data_ptr(), each.size)
            found[index] = each.turned(flat.view(each.shape))
    rest = [index for index in range(len(wanted)) if index not in found]
    found |= zip(rest, read(wanted[index] for index in rest), strict=True)
    return [found[index] for index in range(len(wanted))]


def _is_mappable(stored: Stored) -> bool:
    return stored.dtype == stored.wanted and stored.size > 0 and stored.offset % stored.dtype.itemsize == 0


def read(tensors: Iterable[Stored]) -> list[Tensor]:
    """Tensors on the CPU, cast as they are wanted, in one arena; in order, whatever the order of their bytes.

    What is cast is read aside first, one tensor at a time. Raises WeightsError.
    """
    wanted = list(tensors)
    arena = Arena(Arena.room(each.nbytes for each in wanted))
    places = [arena.take(each.shape, each.wanted) for each in wanted]
    for file in {each.file for each in wanted}:
        file.check()
    for index in sorted(range(len(wanted)), key=lambda index: (wanted[index].file.path, wanted[index].offset)):
        each, (tensor, memory) = wanted[index], places[index]
        if each.dtype == each.wanted:
            each.file.read(memory, each.offset)
            continue
        aside, raw = Arena(each.size).take(each.shape, each.dtype)
        each.file.read(raw, each.offset)
        tensor.copy_(aside)
        raw.release()
    return [each.turned(tensor) for each, (tensor, _) in zip(wanted, places, strict=True)]


def read_apart(stored: Stored) -> Tensor:
    """One tensor on the CPU, cast as it is wanted, in memory of its own. Raises WeightsError."""
    stored.file.check()
    plain = torch.empty(stored.shape, dtype=stored.dtype)
    if stored.size:
        stored.file.read(bytes_of(plain), stored.offset)
    return stored.turned(plain.to(stored.wanted))


def apart(tensor: Tensor) -> Tensor:
    """A copy in an arena of its own, out of the way of what comes and goes around it."""
    copy, _ = Arena(tensor.nbytes).take(tuple(tensor.shape), tensor.dtype)
    return copy.copy_(tensor)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor of the CPU that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


# ---- stand-ins ------------------------------------------------------------------------------------------------------

Waiting = dict[int, tuple[Tensor, Stored]]
_WAITING: ContextVar[Waiting | None] = ContextVar("gesso_waiting", default=None)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it, loaders that can do so leave tensors in their files. What is around it counts on within."""
    around = _WAITING.get()
    token = _WAITING.set({} if around is None else around)
    try:
        yield
    finally:
        _WAITING.reset(token)


def is_deferred() -> bool:
    """Whether tensors are to be left in their files for now."""
    return _WAITING.get() is not None


@contextmanager
def at_once() -> Iterator[None]:
    """Within it, tensors are read whatever is said around it."""
    token = _WAITING.set(None)
    try:
        yield
    finally:
        _WAITING.reset(token)


def stand_in(stored: Stored) -> Tensor:
    """A tensor for one that stays in its file; `stored_of` knows it again, also as a network's parameter."""
    waiting = _WAITING.get()
    assert waiting is not None
    if not _count(stored.shape):
        return torch.empty(stored.shape, dtype=stored.wanted)
    tensor = stored.turned(ghost(stored.shape, stored.wanted, CPU))
    waiting[tensor.data_ptr()] = tensor, stored
    return tensor


def stored_of(tensor: Tensor) -> Stored | None:
    """What a stand-in stands for, None for other tensors."""
    waiting = _WAITING.get()
    found = waiting.get(tensor.data_ptr()) if waiting and kind_of(tensor.device) == CPU else None
    return None if found is None else found[1]


def ghost(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of one number, seen as many: shape, dtype, device and `nbytes` are those of what it stands for."""
    single = torch.zeros((1,) * len(shape), dtype=dtype, device=device)
    if dtype.is_floating_point:
        with contextlib.suppress(NotImplementedError):  # of dtypes of 8 bits not all have it
            single.fill_(float("nan"))
    return single.expand(shape)


def _count(shape: Iterable[int]) -> int:
    total = 1
    for edge in shape:
        total *= edge
    return total
