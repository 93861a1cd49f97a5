"""Parts that several shipped models share: one file in `zoo/shared`, named by its digest, instead of one a model.

A model folder's `config.json` may say `"shared": {"text.safetensors": "<sha256>"}`; that part then lies in the zoo's
shared room as `<sha256>.safetensors`, and the folder's manifest still lists it. Models that users export hold all of
their parts; a copy of a folder that ships needs the room of an installed gesso. Parts are moved by
`python -m gesso.weights.shared FOLDER PART…`. Not here: what a part is (`weights/infinity`, `weights/flow_nano`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from gesso.errors import FileError, WeightsError
from gesso.files import ready_folder, written_aside
from gesso.weights import digests, manifest
from gesso.weights.configuration import read_config

PARTS = ("text.safetensors", "autoencoder.safetensors", "tokenizer.safetensors")
"""What models may have in common; a transformer is always a model's own."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def part(folder: Path, name: str) -> Path:
    """Where a model's part lies: in its folder, or, if its configuration says so, in the shared room.

    A listed part is the shared one even where the folder holds a file of its name: the manifest speaks of that.
    Raises FileError where it lies in neither, WeightsError where the shared file is not what its name says.
    """
    digest = listed(folder).get(name)
    if digest is None:
        if not (folder / name).is_file():
            raise FileError(folder, f"lacks {name}", "export the model again")
        return folder / name
    path = manifest.shared_path(digest)
    if not path.is_file():
        raise FileError(path, f"is missing, which {folder.name} shares as {name}", "install gesso again")
    if digests.sha256(path) != digest:
        raise WeightsError(path, detail="was altered: its digest is not its name; install gesso again")
    return path


def listed(folder: Path) -> dict[str, str]:
    """Digests by name of the parts that a model's folder leaves to the shared room. Raises FileError."""
    config = read_config(folder)
    found = config.get("shared", {})
    if not isinstance(found, dict) or not all(
        name in PARTS and isinstance(digest, str) and _DIGEST.fullmatch(digest) for name, digest in found.items()
    ):
        raise FileError(folder, "its configuration's list of shared parts is unusable", "export the model again")
    return found


def share(folder: Path, names: Sequence[str] = PARTS) -> dict[str, Path]:
    """Move a model's parts into the shared room, for shipping; returns where each lies now.

    Parts that are there already are not written again. No part is removed from the folder before it lies in the room
    and the configuration says so; run again after an interruption, it finishes. Raises FileError, WeightsError.
    """
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise FileError(folder, f"{', '.join(unknown)} cannot be shared", f"parts: {', '.join(PARTS)}")
    digests = listed(folder)
    for name in names:
        if (folder / name).is_file():
            digests[name] = _into_the_room(folder / name)
    for name in digests:
        if not manifest.shared_path(digests[name]).is_file():
            part(folder, name)  # says what is missing, and what to do
    path = folder / "config.json"
    _write_json(path, read_config(folder) | ({"shared": digests} if digests else {}))
    known = manifest.names(folder)  # a card that lies beside the model is none of its files
    made = manifest.make(folder, shared=digests)
    _write_json(folder / manifest.NAME, {name: entry for name, entry in made.items() if name in known})
    for name in digests:
        (folder / name).unlink(missing_ok=True)
    return {name: part(folder, name) for name in digests}


def _into_the_room(source: Path) -> str:
    """Copy a file into the shared room, unless it is there, and return its digest."""
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    target = manifest.shared_path(digest)
    ready_folder(target.parent)
    if not target.is_file() or target.read_bytes() != content:
        with written_aside(target) as aside:
            aside.write_bytes(content)
    return digest


def _write_json(path: Path, values: object) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Move parts of a model into the room of shared parts, for shipping.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    given = parser.parse_args(arguments)
    share(given.folder, given.parts)


if __name__ == "__main__":
    main()
