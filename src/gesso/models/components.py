"""Parts of models that are held once: two pipelines whose text encoder is the same hold one text encoder.

The same is what has equal files, configuration, class and dtype, and lies in memory likewise. Those that make parts
from files ask `shared`; whoever puts a model together says so by `held_once`, without which everything is made anew.
Parts are held weakly, they go with the last pipeline that has them, and they are shared within one thread, since an
engine's thread alone works with its models. A part that is shared must be changed by none of its pipelines.
Not here: where parts lie in memory (`engine/loading/build`).
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from gesso.errors import GessoError

Part = TypeVar("Part", bound=nn.Module)

_REMARKS = ("transformers_version", "torch_dtype", "dtype")  # in a configuration; the dtype is the loader's choice

# By what a part looks like, and the digests of its files.
_held: weakref.WeakValueDictionary[tuple[Hashable, tuple[str, ...]], nn.Module] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@dataclass(eq=False)
class _Made:
    """A part that the model under way has made: what it looks like, its files, and itself."""

    looks: Hashable
    source: Path
    part: weakref.ref[nn.Module]


@dataclass(eq=False)
class _Loading:
    """A model that is being put together: what its parts must have in common with those that are there."""

    placement: Hashable
    digest: Callable[[Path], str]
    made: list[_Made] = field(default_factory=list)
    found: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)


_loading: ContextVar[_Loading | None] = ContextVar("gesso_components", default=None)


@contextmanager
def held_once(placement: Hashable, digest: Callable[[Path], str]) -> Iterator[None]:
    """Within it a model is put together: parts that are there are used again, and those it makes are kept for others.

    They are kept once the block has succeeded, that is, when they are filled and placed.

    Args:
        placement: all that decides where and how parts lie in memory.
        digest: SHA-256 of a file.
    """
    loading = _Loading((placement, threading.get_ident()), digest)
    token = _loading.set(loading)
    try:
        yield
        for made in loading.made:
            part, contents = made.part(), _contents(made.source, digest)
            if part is not None and contents:
                with _lock:
                    _held[made.looks, contents] = part
    finally:
        _loading.reset(token)


def shared(source: Path, kind: str, dtype: torch.dtype, make: Callable[[], Part], config: object = None) -> Part:
    """The part that these files make: one that is there already, or made now.

    Files are hashed before only where a part is there that they may make too: hashing takes as long as reading.

    Args:
        source: a file of weights, or the folder of a part with its `config.json`.
        kind: what it is made into: the name of a class, and what else makes a difference.
        dtype: that of its weights.
        make: makes it, and raises what is wrong with the files.
        config: what a file is made with, where no configuration lies beside it; its `repr` tells it from others.
    """
    loading = _loading.get()
    if loading is None:
        return make()
    try:
        looks = (kind, dtype, repr(config), loading.placement, _looks(source))
    except (OSError, ValueError):  # which `make` puts into words
        return make()
    found = _find(loading, looks, source)
    if found is None:
        found = make()
        loading.made.append(_Made(looks, source, weakref.ref(found)))
    return found  # pyright: ignore[reportReturnType]  # `kind` says that it is what `make` would make


def is_placed(part: nn.Module) -> bool:
    """Whether a part of the model that is being put together is another's, which lies where it belongs already."""
    loading = _loading.get()
    return loading is not None and part in loading.found


def _find(loading: _Loading, looks: Hashable, source: Path) -> nn.Module | None:
    """The part of the model under way, or of another, that these files would make once more."""
    alike = [made for made in loading.made if made.looks == looks]
    with _lock:
        others = any(found == looks for found, _ in _held)
    if not (alike or others) or not (contents := _contents(source, loading.digest)):
        return None
    own = next((made.part() for made in alike if _contents(made.source, loading.digest) == contents), None)
    if own is not None:
        return own
    with _lock:
        found = _held.get((looks, contents))
    if found is not None:
        loading.found.add(found)
    return found


def _looks(source: Path) -> str:
    """What parts can be told apart by at a glance: configuration, without what its writer left there, and sizes."""
    sizes = [path.stat().st_size for path in _files(source)]
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) if source.is_dir() else None
    if isinstance(config, dict):
        config = {name: value for name, value in config.items() if name[:1] != "_" and name not in _REMARKS}
    return json.dumps([config, sizes], sort_keys=True)


def _contents(source: Path, digest: Callable[[Path], str]) -> tuple[str, ...]:
    """Digests of a part's files; none where one cannot be read, which whoever reads it puts into words."""
    try:
        return tuple(digest(path) for path in _files(source))
    except (OSError, GessoError):
        return ()


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    return sorted(path for ending in ("*.safetensors", "*.index.json") for path in source.glob(ending))
