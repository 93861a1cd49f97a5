"""The entry of a model that lies in a folder or file of the user's: of our own layout, of diffusers', or one file.

Goes by names, configurations and headers, and reads no tensor. Not here: telling foreign files apart (`foreign`).
"""

from __future__ import annotations

from pathlib import Path

from gesso.errors import FileError
from gesso.weights import headers, manifest
from gesso.weights.catalogue import foreign, tables
from gesso.weights.catalogue.entry import Entry, shared_parts
from gesso.weights.configuration import read_config

_INDEX, _CONFIG = "model_index.json", "config.json"


def describe(path: Path, name: str) -> Entry:
    """The entry of what lies there.

    Raises FileError for what is no model, or one of a family that is not known, and says what it is; WeightsError for a
    file that is damaged or holds no tensors at all.
    """
    if path.is_file():
        return _one_file(path, name)
    if (path / _INDEX).is_file():
        return _diffusers(path, name)
    if path.is_dir() and not (path / _CONFIG).is_file():
        checkpoints = [file for file in path.glob("*.safetensors") if not file.name.startswith("pytorch_lora")]
        if len(checkpoints) != 1:
            raise foreign.no_model(path)
        return _one_file(checkpoints[0], name)
    return _own(path, name)


def _one_file(path: Path, name: str) -> Entry:
    """A single file with all parts of a model in it."""
    if path.suffix in foreign.PICKLES and foreign.is_of_infinity(path):
        raise FileError(path, "holds a part of an Infinity", foreign.INFINITY)
    if path.suffix in foreign.PICKLES and headers.foreign_file(path) is None:
        raise FileError(path, "is no .safetensors file", "get the model as .safetensors")
    found = foreign.recognise(headers.read_header(path))
    family = tables.families().get(found.family)
    if family is None or not family.one_file:
        own = (path.parent / manifest.NAME).is_file() and (path.parent / _CONFIG).is_file()
        hint = f"name the whole model: {path.parent}" if own else found.hint
        raise FileError(path, f"holds {found.what}", hint)
    return Entry(
        name=name,
        family=found.family,
        description=f"{found.what}, {path.name}",
        licence="see where it is from",
        source="local file",
        folder=path.parent,
        layout="file",
        files=(path.name,),
        size=path.stat().st_size,
    )


def _own(folder: Path, name: str) -> Entry:
    """A folder that our trainers exported, described by its `config.json`."""
    config = read_config(folder)
    if "family" not in config and (problem := foreign.part_of_a_model(folder, config)):
        raise problem
    family = str(config.get("family"))
    known = {each: table for each, table in tables.families().items() if table.own_files}
    if family not in known:
        allowed = f"families that can be painted with: {', '.join(known)}"
        raise FileError(folder, f"holds a model of the family {family}", allowed)
    generation = config.get("generation")
    besides = known[family].identity_files if config.get("identity") is not None else ()
    return Entry(
        name=name,
        family=family,
        description="trained with gesso train",
        licence="yours",
        source="local folder",
        folder=folder,
        layout="gesso",
        files=("config.json", "manifest.json", *known[family].own_files, *besides),
        size=sum(path.stat().st_size for path in (*folder.iterdir(), *shared_parts(folder).values()) if path.is_file()),
        defaults=dict(generation) if isinstance(generation, dict) else {},
    )


def _diffusers(folder: Path, name: str) -> Entry:
    """A folder in diffusers' layout, whose index names the pipeline."""
    index = read_config(folder, _INDEX)
    called = str(index.get("_class_name"))
    known = {each: family for family, table in tables.families().items() for each in table.classes}
    if called not in known:
        allowed = f"families that can be painted with: {', '.join(sorted(set(known.values())))}"
        raise FileError(folder, f"holds diffusers' {called}", allowed)
    family = "sdxl-refiner" if index.get("requires_aesthetics_score") else known[called]
    return Entry(
        name=name,
        family=family,
        description=f"{family} in diffusers' layout",
        licence="see its folder",
        source="local folder",
        folder=folder,
        layout="diffusers",
        files=tuple(tables.families()[family].parts),
    )
