"""Paths among a request's fields, written in full: what a picture records has to lead to the same file from any folder.

Here: which fields may be paths of this machine, and which of their values are. Not here: what is read there.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from gesso.errors import RequestError


def absolute_paths(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields with every relative path that leads somewhere from here made absolute.

    What leads nowhere stays as it was typed, for the errors that quote it. So do names of the catalogue, which win over
    folders of the same name.
    """
    found = dict(fields)
    for name in ("init_image", "mask"):
        if name in found:
            found[name] = _file(found[name])
    for name in ("identity", "refiner"):
        if isinstance(part := found.get(name), dict):
            found[name] = {key: _OF_PARTS[key](value) if key in _OF_PARTS else value for key, value in part.items()}
    if isinstance(person := found.get("identity"), str):
        found["identity"] = _file(person)
    for name in ("model", "refiner"):
        if isinstance(found.get(name), str):
            found[name] = absolute_model(found[name])
    if isinstance(adapters := found.get("lora"), tuple):
        found["lora"] = tuple(_adapter(source) for source in adapters)
    return found


def _file(value: object) -> object:
    if not isinstance(value, str) or not os.path.exists(value):  # Path.exists raises for a name that is too long
        return value
    return str(Path(value).absolute())


def absolute_model(value: object) -> object:
    """A model's name as it is, and its path in full."""
    from gesso.weights import catalogue

    return value if value in catalogue.names() else _file(value)


def _adapter(value: object) -> object:
    from gesso.adapters.sources import parse, split_scale

    if not isinstance(value, str):
        return value
    try:
        plain, scale = split_scale(value.strip())
        source = parse(plain)
    except RequestError:  # the schema refuses it in its own words
        return value
    if source.path is None or source.path.is_absolute() or not os.path.exists(source.path):
        return value
    return str(source.path.absolute()) + ("" if scale is None else f"::{value.strip().rpartition('::')[2]}")


_OF_PARTS = {"image": _file, "pose": _file, "model": absolute_model}
