"""Every model by name: its family, where its files lie, its licence and defaults. The look-up; the data is beside it.

A name is one of the catalogue's (`families/*.toml`), one of the user's (`GESSO_HOME/models.toml`), or the path of a
folder or file with a model in it. Not here: the schema (`tables`), what a path holds (`local`), reading tensors
(`files`), putting a model together (`engine/loading`), fetching it (`hub`): a missing model names the command for it.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from gesso.errors import FileError, RequestError
from gesso.settings import load_settings
from gesso.weights.catalogue import local, tables
from gesso.weights.catalogue.entry import Entry, Layout, Source
from gesso.weights.catalogue.tables import ModelTable, user_file

__all__ = ["ZOO", "Entry", "Layout", "Source", "find", "find_painter", "makes_videos", "names", "problems"]

ZOO = Path(__file__).parents[2] / "zoo"
_LONGEST_NAME = 80  # characters of a name that an error repeats


def names() -> list[str]:
    """All names: what ships with gesso, what it can fetch, what the user has added."""
    return [*tables.published(), *tables.users_models().models]


def makes_videos(entry: Entry) -> bool:
    """Whether what a model makes are videos."""
    return tables.families()[entry.family].video


def problems() -> list[FileError]:
    """What is wrong with the user's own entries, which are left out of `names`."""
    return list(tables.users_models().problems.values())


def find(name_or_path: str) -> Entry:
    """The entry of a name, or one made for the folder or file of a model.

    Raises RequestError for an unknown name (with the nearest ones), FileError for a path that holds no model and for an
    entry of the user's that cannot be used.
    """
    if (row := tables.published().get(name_or_path)) is not None:
        return _shipped(name_or_path, row) if tables.ships(row) else _pulled(name_or_path, row)
    users = tables.users_models()
    if name_or_path in users.models:
        return _users(name_or_path, users.models[name_or_path])
    if name_or_path in users.problems:
        raise users.problems[name_or_path]
    looks_like_path = "/" in name_or_path or "\\" in name_or_path or name_or_path.startswith((".", "~"))
    try:
        if looks_like_path or Path(name_or_path).exists():
            return _local(_expanded(name_or_path), name_or_path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        hint = "name a model of the catalogue or a folder with one"
        raise FileError(_shortened(name_or_path), _unreadable(error), hint) from error
    if "" in users.problems:  # the name may be in there
        raise users.problems[""]
    near = difflib.get_close_matches(name_or_path, names(), n=2)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    raise RequestError("model", name_or_path, "a known model", f"{suggestion}(gesso models lists {len(names())})")


def find_painter(name_or_path: str) -> Entry:
    """The same for a model that is to paint. Raises RequestError for one that does not, and says what it is for."""
    entry = find(name_or_path)
    family = tables.families()[entry.family]
    if not family.paints:
        raise RequestError("model", name_or_path, "a model that paints", family.instead)
    return entry


def _shortened(path: str) -> str:
    return path if len(path) <= _LONGEST_NAME else f"{path[:_LONGEST_NAME]}…"


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({(error.strerror or str(error)).lower()})"


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # "~somebody" where nobody has that name
        raise FileError(path, "no such folder", "name a model of the catalogue or a folder with one") from error


def _local(path: Path, name: str) -> Entry:
    """A model by its path, however that is written; one that ships or was pulled is the catalogue's by its path too."""
    here = _real(path)
    row = tables.published().get(here.name)
    if row is not None and tables.ships(row) and here == _real(ZOO / here.name):
        return replace(_shipped(here.name, row), name=name)
    for each, row in (tables.published() | tables.users_models().models).items():
        if row.sources and _lies_in(here, entry := _pulled(each, row)):
            return replace(entry, name=name)
    return local.describe(path, name)


def _lies_in(here: Path, entry: Entry) -> bool:
    """Whether a place is a pulled model's folder, or its one file with all parts in it."""
    own = [entry.folder, *(entry.folder / name for name in entry.files[:1] if entry.layout == "file")]
    return here in map(_real, own) and entry.folder.is_dir()


def _real(path: Path) -> Path:
    """Where a path leads from here and by links, whether or not anything is there."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a name that no file has
        return path


def _shipped(name: str, row: ModelTable) -> Entry:
    return replace(
        local.describe(ZOO / name, name), description=row.description, licence=row.licence, source="ships with gesso"
    )


def _pulled(name: str, row: ModelTable) -> Entry:
    """A model that a hub has, and that lies in the home once it was pulled."""
    assert row.layout
    return Entry(
        name=name,
        family=row.family,
        description=row.description,
        licence=row.licence or "see its repository",
        source=", ".join(source.repository for source in row.sources),
        folder=load_settings().home / "weights" / name,
        layout=row.layout,
        files=row.needed_files(),
        fetch=f"gesso models pull {name}",
        gated=row.gated,
        download=row.download,
        parameters=row.parameters,
        sources=row.pulled(),
        needs=tuple(row.needs),
        defaults=tables.families()[row.family].defaults | row.defaults,
    )


def _users(name: str, row: ModelTable) -> Entry:
    """A model of the user's own: to be pulled, or a folder or file that is here, with what the entry says instead."""
    if row.sources:
        return _pulled(name, row)
    path = user_file().parent / _expanded(row.path)
    try:
        if row.layout == "infinity":
            return _users_infinity(name, row, path)
        found = _local(path, name)
    except OSError as error:
        problem = f'models.{name}.path "{_shortened(row.path)}" {_unreadable(error)}'
        raise FileError(user_file(), problem, "name a folder or file that can be") from error
    for field, said, is_one in (("family", row.family, found.family), ("layout", row.layout, found.layout)):
        if said and said != is_one:
            raise FileError(user_file(), f'models.{name}.{field} "{said}" is not what lies there: {is_one}')
    return replace(
        found,
        description=row.description or found.description,
        licence=row.licence or found.licence,
        gated=row.gated or found.gated,
        files=tuple(row.files) or found.files,
        parameters=row.parameters or found.parameters,
        defaults=found.defaults | row.defaults,
    )


def _users_infinity(name: str, row: ModelTable, folder: Path) -> Entry:
    """An Infinity of the user's own, laid out as its authors'; files that lie elsewhere are named by whole paths."""
    if not folder.is_dir():
        raise FileError(folder, "no such folder", f"models.{name}.path in {user_file()} is where its files lie")
    return Entry(
        name=name,
        family="infinity",
        description=row.description or "Infinity in its authors' layout",
        licence=row.licence or "see where it is from",
        source="local folder",
        folder=folder,
        layout="infinity",
        files=tuple(str(_expanded(file)) for file in row.files),
        gated=row.gated,
        parameters=row.parameters,
        needs=tuple(row.needs),
        defaults=tables.families()["infinity"].defaults | row.defaults,
    )
