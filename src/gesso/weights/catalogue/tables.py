"""The catalogue's data: `families/*.toml` beside this file, and the user's `GESSO_HOME/models.toml`, read strictly.

A file of `families` is called as its family, says in `[family]` how models of it are laid out, and lists published
ones in `[models.NAME]`. The user's file lists models in the same words; `path` in it names a folder or file that is
here. Here: the schema and its checks. Not here: what becomes of an entry (the package itself), files of weights.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gesso.errors import FileError, RequestError
from gesso.request import GenerationRequest, parse_request
from gesso.settings import load_settings
from gesso.weights.catalogue.entry import Source

FAMILIES = Path(__file__).parent / "families"
USER_FILE = "models.toml"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_DETAILS = ("prompt", "model", "seed", "num_images", "init_image")  # never a model's default
_NOT_OF_A_REQUEST = ("init_strength",)  # a request has it only together with a picture


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Family(_Table):
    """How models of a family are laid out.

    `own_files` are those of an export beside its configuration and manifest, `identity_files` those that it has besides
    where its configuration has an identity, so that it paints people. `classes` are what `model_index.json` calls its
    pipelines and `parts` what a folder in diffusers' layout must hold. `one_file` says whether it is read from a single
    file with all parts in it. `defaults` are fields of a request where neither a published model nor its entry has its
    own. `video` families make videos, not pictures. Of those that do not paint, `instead` says what they are for.
    """

    own_files: list[str] = []
    identity_files: list[str] = []
    classes: list[str] = []
    parts: list[str] = []
    one_file: bool = False
    defaults: dict[str, object] = {}
    video: bool = False
    paints: bool = True
    instead: str = ""


class _SourceTable(_Table):
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = ""
    patterns: list[str] = []
    folder: str = ""
    modelscope: str = ""


class ModelTable(_Table):
    """One model as a file lists it; `Entry` says what fields mean. The user's file says `path` or `sources` of each."""

    family: str = ""
    layout: Literal["gesso", "infinity", "diffusers", "file", ""] = ""
    path: str = ""
    description: str = ""
    licence: str = ""
    gated: str = ""
    files: list[str] = []
    defaults: dict[str, object] = {}
    parameters: dict[str, int] = {}
    download: int | None = Field(default=None, gt=0)
    needs: list[str] = []
    sources: list[_SourceTable] = []

    def needed_files(self) -> tuple[str, ...]:
        """What has to lie in the model's folder."""
        return tuple(self.files) or tuple(families()[self.family].parts)

    def pulled(self) -> tuple[Source, ...]:
        """Where a hub has the files. A source without patterns has the needed files, each a file or a folder.

        Some repositories hold the same weights once more as a single file; the parts are what is read.
        """
        own = [pattern for name in self.needed_files() for pattern in ((name,) if "." in name else (f"{name}/*",))]
        return tuple(
            Source(
                repository=source.repository,
                revision=source.revision,
                patterns=tuple(source.patterns or own),
                folder=source.folder,
                modelscope=source.modelscope,
            )
            for source in self.sources
        )


@dataclass(frozen=True)
class UserModels:
    """What the user's file lists, and what is wrong with it: by name of an entry, or by "" with the file as a whole."""

    models: dict[str, ModelTable] = field(default_factory=dict)
    problems: dict[str, FileError] = field(default_factory=dict)


def families() -> dict[str, Family]:
    """Every family by name."""
    return _shipped(FAMILIES)[0]


def published() -> dict[str, ModelTable]:
    """Every model that gesso knows by itself, those that ship with it first."""
    return _shipped(FAMILIES)[1]


def ships(row: ModelTable) -> bool:
    """Whether a model that gesso knows by itself lies in the package."""
    return row.layout == "gesso"


@cache
def _shipped(folder: Path) -> tuple[dict[str, Family], dict[str, ModelTable]]:
    kinds: dict[str, Family] = {}
    models: dict[str, ModelTable] = {}
    for path in sorted(folder.glob("*.toml")):
        content = _read(path)
        if unknown := sorted(set(content) - {"family", "models"}):
            raise FileError(path, f"has unknown tables: {', '.join(unknown)}")
        kinds[path.stem] = _parsed(path, "family", Family, content.get("family"))
        for name, values in _tables(path, content.get("models", {})).items():
            models[name] = _parsed(
                path, f"models.{name}", ModelTable, {"family": path.stem, **_table(path, name, values)}
            )
    return kinds, dict(sorted(models.items(), key=lambda item: not ships(item[1])))


def user_file() -> Path:
    """Where the user's list of models lies, whether or not the file exists."""
    return load_settings().home / USER_FILE


def users_models() -> UserModels:
    """The user's own entries. What is wrong with one breaks no other, and is an answer: nothing is raised for it."""
    path = user_file()
    if not path.is_file():
        return UserModels()
    try:
        content = _read(path)
        if unknown := sorted(set(content) - {"models"}):
            raise FileError(path, f"has unknown tables: {', '.join(unknown)}", "entries are called [models.NAME]")
        tables = _tables(path, content.get("models", {}))
    except FileError as error:
        return UserModels(problems={"": error})
    models, problems = {}, {}
    for name, values in tables.items():
        try:
            models[name] = _users_model(path, name, values)
        except FileError as error:
            problems[name] = error
    return UserModels(models, problems)


Refuse = Callable[[str, object, str], FileError]
"""Makes the error of a field of an entry: its name with a dot before it, its value, what is allowed."""


def _users_model(path: Path, name: str, values: object) -> ModelTable:
    """One entry of the user's. Raises FileError that names the file, the entry, the field and the way out."""

    def refuse(field: str, value: object, allowed: str) -> FileError:
        return FileError(path, str(RequestError(f"models.{name}{field}", value, allowed)))

    if not _NAME.fullmatch(name):
        raise refuse("", name, "a name: letters, digits, dots, dashes and underscores, at most 80")
    if name in published():
        raise refuse("", name, "free: gesso has a model of that name; choose another")
    row = _parsed(path, f"models.{name}", ModelTable, _table(path, name, values))
    if bool(row.path) == bool(row.sources):
        raise FileError(path, f"models.{name} says {'both' if row.path else 'neither'} path and sources", "say one")
    if row.family and row.family not in families():
        raise refuse(".family", row.family, f"one of: {', '.join(families())}")
    if row.sources:
        _check_pulled(row, refuse)
    elif row.layout == "infinity":  # that of a path is looked up, but for files whose names and places say nothing
        _check_infinity(row, refuse)
    for each in row.defaults:
        if each not in GenerationRequest.model_fields or each in _DETAILS:
            raise refuse(".defaults", each, "a field of a request that a model has a default for")
    try:
        parse_request(
            {"prompt": "-"} | {key: row.defaults[key] for key in row.defaults if key not in _NOT_OF_A_REQUEST}
        )
    except RequestError as error:
        raise refuse(f".defaults.{error.field}", error.value, error.allowed) from error
    return row


def _check_pulled(row: ModelTable, refuse: Refuse) -> None:
    """Whether what is to be fetched is said well enough to be looked for."""
    if not row.family:
        raise refuse(".family", row.family, f"one of: {', '.join(families())}")
    if row.layout not in ("diffusers", "infinity", "file"):
        raise refuse(".layout", row.layout, "one of: diffusers, infinity, file")
    family = families()[row.family]
    if row.layout == "diffusers" and not family.parts:
        raise refuse(".layout", row.layout, f"one that {row.family} is read from")
    if row.layout == "file" and not family.one_file:
        raise refuse(".layout", row.layout, f"one that {row.family} is read from")
    if row.family == "infinity" or row.layout == "infinity":
        _check_infinity(row, refuse)
    for number, source in enumerate(row.sources):
        if Path(source.folder).is_absolute() or ".." in Path(source.folder).parts:
            raise refuse(
                f".sources.{number}.folder", source.folder, "a folder below the model's own, by its name there"
            )
    if row.layout == "file" and len(row.files) != 1:
        raise refuse(".files", row.files, "a list of the one file")


def _check_infinity(row: ModelTable, refuse: Refuse) -> None:
    """Whether all three files are named of a model as Infinity's authors lay theirs out."""
    if row.layout != "infinity" or row.family not in ("infinity", ""):
        raise refuse(".layout", row.layout, f"one that {row.family} is read from")
    if len(row.files) != 3:
        raise refuse(".files", row.files, "a list of the transformer, the tokenizer and the text encoder")


# Reading, for both kinds of files.


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(path, f"is no TOML ({error})") from error
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error


def _tables(path: Path, found: object) -> dict[str, object]:
    if not isinstance(found, dict):
        raise FileError(path, "models is no table", "entries are called [models.NAME]")
    return found


def _table(path: Path, name: str, found: object) -> Mapping[str, object]:
    if not isinstance(found, dict):
        raise FileError(path, f"models.{name} is no table", f"begin it with [models.{name}]")
    return found


_Any = TypeVar("_Any", bound=_Table)


def _parsed(path: Path, place: str, kind: type[_Any], values: object) -> _Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join((place, *(str(part) for part in first["loc"])))
        if first["type"] == "extra_forbidden":
            raise FileError(path, f"{where} is no field", f"fields: {', '.join(kind.model_fields)}") from error
        raise FileError(path, f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
