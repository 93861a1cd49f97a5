"""Tensors from files: safetensors (one file or sharded), or `.pth` read with nothing executed; and strict filling.

Not here: what a model consists of (`catalogue`), names of foreign files (`models/*/checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gesso.errors import FileError, WeightsError

_PICKLES = (".pth", ".pt", ".ckpt", ".bin")


def read_tensors(path: Path, keys: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder that holds an index of shards or files without one.

    `keys` are names that a `.pth` may wrap its state dict in, tried in order ("vae", "ema"). `dtype` is what numbers
    are cast to, shard by shard, so that a large model is never here twice.
    Raises FileError for a missing or foreign file, WeightsError for a truncated one.
    """
    if path.is_dir():
        return _read_folder(path, dtype)
    state = _read_file(path, keys)
    if dtype is None:
        return state
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def _read_file(path: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileError(path, "no such file", "name a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLES:
        return _read_pickle(path, keys)
    raise FileError(path, "not a file of weights", "name a .safetensors or .pth file")


def fill(network: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Put tensors into a network, strictly: every name, every shape, nothing left over.

    The network may be on the meta device; it takes the tensors themselves then, and no memory is used twice.
    Raises WeightsError that names what is missing, unexpected or of the wrong shape.
    """
    wanted = network.state_dict()
    missing = tuple(name for name in wanted if name not in state)
    unexpected = tuple(name for name in state if name not in wanted)
    mismatched = tuple(
        f"{name}: {tuple(state[name].shape)} where {tuple(value.shape)} is wanted"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    )
    if missing or unexpected or mismatched:
        raise WeightsError(source, missing=missing, unexpected=unexpected, mismatched=mismatched)
    network.load_state_dict(dict(state), strict=True, assign=True)


def digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(path, detail=f"truncated or not safetensors ({error})") from error


def _read_pickle(path: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is a plain pickle, which cannot be mapped
        with warnings.catch_warnings(action="ignore"):  # about pickles of others; what matters is raised
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # bytes of any kind make torch's reader raise nearly anything
        first = str(error).partition("\n")[0]
        raise WeightsError(path, detail=f"truncated, or holds more than tensors ({first})") from error
    for key in keys:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(path, detail="not a dictionary of tensors")
    return found


def _read_folder(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A sharded folder by its index; without one, every safetensors file in it."""
    indexes = sorted(folder.glob("*.index.json"))
    if indexes:
        names = sorted(set(_weight_map(indexes[0]).values()))
        shards = [folder / Path(name).name for name in names]
    else:
        shards = sorted(folder.glob("*.safetensors")) or sorted(
            path for path in folder.iterdir() if path.suffix in _PICKLES
        )
    if not shards:
        raise FileError(folder, "holds no weights", "name a folder with .safetensors files")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_tensors(shard, dtype=dtype)
    return state


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise FileError(index, "not an index of shards", "fetch it again") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and Path(name).name for name in found.values()):
        raise FileError(index, "not an index of shards", "fetch it again")
    return found
