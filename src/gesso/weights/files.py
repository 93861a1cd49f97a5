"""Tensors from files: safetensors (one file or sharded), or `.pth` read with nothing executed; and strict filling.

Not here: what a model consists of (`catalogue`), names of foreign files (`models/*/checkpoint`), which files of a
folder count (`gesso.shards`), bytes of a tensor (`gesso.stored`), digests of single files (`digests`).
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gesso import shards, stored
from gesso.devices import CPU
from gesso.errors import FileError, WeightsError
from gesso.weights import digests, headers

_ADVICE = "weights_only"  # in what torch says of a pickle with code in it


def read_tensors(
    path: Path,
    keys: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    *,
    pickles: bool = True,
    later: bool = False,
) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder that holds an index of shards or files without one.

    `keys` are names that a `.pth` may wrap its state dict in, tried in order ("vae", "ema"). `dtype` is what numbers
    are cast to, tensor by tensor, so that a large model is never here twice. Without `pickles` only safetensors are
    read. `later` is for networks that go to `Build.place`: where reading is deferred (`gesso.stored`), what lies in
    safetensors stays there, and stand-ins are returned.
    Raises FileError for a missing or foreign file and for shards that contradict each other, WeightsError for a
    truncated one.
    """
    if path.is_dir():
        read = partial(read_tensors, dtype=dtype, pickles=pickles, later=later)
        return shards.merged(path, read, pickles=pickles)
    if not path.is_file():
        raise FileError(path, "no such file", "name a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, dtype, later)
    if pickles and path.suffix in shards.PICKLES:
        return {name: _cast(value, dtype) for name, value in _read_pickle(path, keys).items()}
    raise FileError(path, "not a file of weights", f"name a .safetensors{' or .pth' if pickles else ''} file")


def check_shards(folder: Path) -> None:
    """Refuse a folder of safetensors that others read: with an index that leads elsewhere, or files that are absent.

    Raises FileError for these and for files of something else, WeightsError for a file that is truncated.
    """
    for shard in shards.find(folder, pickles=False)[0]:
        if not shard.is_file():
            raise FileError(shard, "no such file", "fetch it again")
        headers.read_header(shard)


def fill(network: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put tensors into a network, strictly: every name, every shape, nothing left over.

    The network may be on the meta device; it takes the tensors themselves then, and no memory is used twice.
    Raises WeightsError that names what is missing, unexpected, of the wrong shape or made of other numbers.
    """
    wanted = network.state_dict()
    missing = tuple(name for name in wanted if name not in state)
    unexpected = tuple(name for name in state if name not in wanted)
    mismatched = tuple(
        f"{name}: {problem}" for name, value in wanted.items() if (problem := _mismatch(state.get(name), value))
    )
    if missing or unexpected or mismatched:
        raise WeightsError(source, missing=missing, unexpected=unexpected, mismatched=mismatched)
    network.load_state_dict(dict(state), strict=True, assign=True)


def _mismatch(found: Tensor | None, wanted: Tensor) -> str:
    """Why a tensor cannot stand for another, "" if it can."""
    if found is None:
        return ""
    if found.shape != wanted.shape:
        return f"{tuple(found.shape)} where {tuple(wanted.shape)} is wanted"
    if found.is_floating_point() != wanted.is_floating_point():
        return f"{_name(found.dtype)} where {_name(wanted.dtype)} is wanted"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def files_of(folder: Path, parts: Iterable[str]) -> list[Path]:
    """Every file of the parts of a model, each a file or a folder, in order of their names."""
    paths = [folder / part for part in parts]
    return sorted(path for part in paths for path in (part.rglob("*") if part.is_dir() else [part]) if path.is_file())


def digest(paths: Iterable[Path]) -> str:
    """One digest for the contents of files, in the order given: the SHA-256 of their SHA-256s. Raises FileError."""
    return hashlib.sha256("".join(digests.sha256(path) for path in paths).encode()).hexdigest()


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def _read_safetensors(path: Path, dtype: torch.dtype | None, later: bool) -> dict[str, Tensor]:
    headers.read_header(path)  # says of other files what they are
    take = stored.stand_in if later and stored.is_deferred() else stored.read_apart
    return {name: take(each.cast_to(dtype)) for name, each in stored.read_header(path).items()}


def _read_pickle(path: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is a plain pickle, which cannot be mapped
        with warnings.catch_warnings(action="ignore"):  # about pickles of others; what matters is raised
            found = torch.load(path, map_location=CPU, weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # bytes of any kind make torch's reader raise nearly anything
        if _ADVICE in str(error):  # to read it all the same, which would execute what it holds
            raise WeightsError(path, detail="holds more than tensors; nothing was executed") from error
        first = str(error).partition("\n")[0]
        raise WeightsError(path, detail=f"truncated, or holds more than tensors ({first})") from error
    for key in keys:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(path, detail="not a dictionary of tensors")
    return found
