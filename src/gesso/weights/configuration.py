"""Reading the JSON objects that lie beside weights, and sizes in them. Not here: what else is in them."""

from __future__ import annotations

import json
from pathlib import Path

from gesso.errors import FileError


def read_config(folder: Path, name: str = "config.json") -> dict[str, object]:
    """A model folder's configuration. Raises FileError where there is none, or it is no object."""
    path = folder / name
    if not folder.is_dir():
        raise FileError(folder, "no such folder", "name a model of the catalogue or a folder with one")
    if not path.is_file():
        wanted = "name a folder that gesso train has exported, or one in diffusers' layout"
        raise FileError(folder, f"holds no model (no {name})", wanted)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(path, f"cannot be read ({(error.strerror or str(error)).lower()})") from error
    except (ValueError, RecursionError) as error:
        raise FileError(path, "is not JSON", "fetch or export the model again") from error
    if not isinstance(config, dict):
        raise FileError(path, "is not a configuration", "fetch or export the model again")
    return config


def whole_number(source: Path | str, name: str, value: object) -> int:
    """A size that a configuration says. Raises FileError for what is no whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FileError(source, f"{name} {json.dumps(value)} is not a whole number above 0", "fetch it again")
    return value
