"""Which files of a folder hold its tensors: the shards that an index lists or, without one, all of them but variants.

Everyone who reads a folder's weights asks here, so that all take the same. Goes by names and the index alone. Not here:
reading the files (`stored`, `weights/files`), which folders a model has (`weights/catalogue`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from gesso.errors import FileError

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""How files of weights end that are no safetensors."""

_SAFETENSORS_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d+-of-\d+$")

_Tensor = TypeVar("_Tensor")


def find(folder: Path, *, pickles: bool) -> tuple[list[Path], dict[str, str]]:
    """A folder's files of weights, and which of them an index says that each tensor is in (where it has an index).

    Files that the index lists need not be there. Raises FileError for a folder without weights, and for an index that
    is none or leads out of it.
    """
    index = _index(folder, pickles)
    listed = _weight_map(index, pickles) if index else {}
    shards = [folder / name for name in sorted(set(listed.values()))] if index else _unlisted(folder, pickles)
    if not shards and pickles:
        raise FileError(folder, "holds no weights", "name a folder with .safetensors files")
    if not shards:
        raise FileError(folder, "holds no weights in .safetensors", "other formats are not read; fetch it again")
    return shards, listed


def merged(folder: Path, read: Callable[[Path], Mapping[str, _Tensor]], *, pickles: bool) -> dict[str, _Tensor]:
    """What `read` finds in each of the folder's files, by the tensors' names.

    Raises FileError as `find`, and for shards that contradict each other; and what `read` does.
    """
    shards, listed = find(folder, pickles=pickles)
    found: dict[str, _Tensor] = {}
    holders: dict[str, str] = {}
    for shard in shards:
        for name, value in read(shard).items():
            if listed.get(name, shard.name) != shard.name:
                continue  # the index means another shard's
            if name in holders:
                problem = f"{holders[name]} and {shard.name} both hold {name}, and no index says which one counts"
                raise FileError(folder, problem, "leave one of them there")
            found[name], holders[name] = value, shard.name
    return found


def _index(folder: Path, pickles: bool) -> Path | None:
    """The index of a folder's shards, None where it has none: safetensors first, and a variant such as fp16 last.

    A whole file without a variant's name goes before a variant's index.
    """
    found = sorted(folder.glob("*.index.json" if pickles else f"*{_SAFETENSORS_INDEX}"), key=_preference)
    if not found or (_is_variant(found[0]) and any(not _is_variant(path) for path in folder.glob("*.safetensors"))):
        return None
    return found[0]


def _preference(index: Path) -> tuple[bool, bool, str]:
    return not index.name.endswith(_SAFETENSORS_INDEX), _is_variant(index), index.name


def _unlisted(folder: Path, pickles: bool) -> list[Path]:
    """Files of weights where no index lists them; a variant is left out where what it is a variant of is there."""
    found = sorted(folder.glob("*.safetensors"))
    plain = {_root(path) for path in found if not _is_variant(path)}
    found = [path for path in found if not _is_variant(path) or _root(path) not in plain]
    if found or not pickles:
        return found
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def _is_variant(path: Path) -> bool:
    """Whether a name has a variant's part, as model.fp16.safetensors has and its index, where it has one."""
    return "." in path.name.removesuffix(".index.json").removesuffix(path.suffix).removesuffix(".safetensors")


def _root(path: Path) -> str:
    """What shards and variants of a file have in common: "model" of model-00001-of-00002.fp16.safetensors."""
    return _SHARD.sub("", path.name.partition(".")[0])


def _weight_map(index: Path, pickles: bool) -> dict[str, str]:
    """The shard of each tensor: names of files that lie beside the index."""
    suffixes = (".safetensors", *(PICKLES if pickles else ()))
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise FileError(index, "is not an index of shards", "fetch it again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise FileError(index, "is not an index of shards", "fetch it again")
    if not all(Path(name).name == name and name.endswith(suffixes) for name in found.values()):
        raise FileError(index, f"lists shards that are no {' or '.join(suffixes)} beside it", "fetch it again")
    return found
