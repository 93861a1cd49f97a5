"""What is known of one model: `Entry`, and where a hub has its files: `Source`.

Not here: which models there are (`families`, `tables`), finding one by name or path (the package itself).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gesso.errors import FileError, MissingError
from gesso.weights import headers, manifest, shared

Layout = Literal["gesso", "infinity", "diffusers", "file"]
"""How files are named: by our trainers, by Infinity's authors, by diffusers; or one file with all parts in it."""

BFLOAT16 = 2
"""Bytes of a parameter, in what is said of memory."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one repository of a hub: those whose names one of `patterns` matches, as the shell would ("*", "?").

    `folder` is where they go below the entry's. `modelscope` is the repository's name there, "" where none is known.
    `revision` is a branch, tag or commit, "" the hub's main branch.
    """

    repository: str
    patterns: tuple[str, ...]
    folder: str = ""
    modelscope: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model. `folder` holds its files; `files` are what must lie there, `size` their bytes where known.

    `sources` are where a hub has them, `fetch` is the command that gets them: none for what ships or is a user's. What
    it fetches is about `download` bytes; `gated` says what has to be accepted before, and where.
    `needs` are sentences about what has to be here besides, and that `fetch` does not get.
    `parameters` are counted by part, where they are known without the files. `defaults` are fields of a request.
    """

    name: str
    family: str
    description: str
    licence: str
    source: str
    folder: Path
    layout: Layout
    files: tuple[str, ...]
    size: int | None = None
    fetch: str = ""
    gated: str = ""
    download: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    needs: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each part: as they are known, or else counted in the headers of what lies in the folder.

        Of Infinity's layout they are not counted: pickles have no header, and of the text encoder only half is used.
        """
        if self.parameters or self.layout == "infinity":
            return self.parameters
        return headers.count_parameters(self.part_paths())

    def memory(self) -> dict[str, int]:
        """Bytes of the weights of each part in bfloat16, as far as its parameters are known."""
        return {part: BFLOAT16 * count for part, count in self.count_parameters().items()}

    def part_paths(self) -> dict[str, Path]:
        """Each of `files`, by its name without an ending: where it lies, or would lie."""
        elsewhere = shared_parts(self.folder) if self.layout == "gesso" and self.folder.is_dir() else {}
        return {name.partition(".")[0]: elsewhere.get(name, self.folder / name) for name in self.files}

    def missing_files(self) -> list[str]:
        """Which of `files` lie neither in `folder` nor, for models that ship, in the room of shared parts."""
        elsewhere = shared_parts(self.folder) if self.layout == "gesso" else {}
        missing = [name for name in self.files if name not in elsewhere and not (self.folder / name).exists()]
        unfinished = self.sources and (self.folder / manifest.UNFINISHED).exists()
        return missing or (["the rest of a pull that was cut short"] if unfinished else [])

    def require_files(self) -> None:
        """Refuse a model whose files are not all here: MissingError with the command that mends it, or FileError."""
        missing = ", ".join(self.missing_files())
        if missing and self.fetch:
            raise MissingError(f"{self.name} ({missing} in {self.folder})", self.fetch)
        for name in self.missing_files() if self.layout == "gesso" else ():
            shared.part(self.folder, name)  # says where a part that is shared should lie
        if missing:
            again = "export the model again" if self.layout == "gesso" else "fetch it again"
            raise FileError(self.folder, f"lacks {missing}", again)


def shared_parts(folder: Path) -> dict[str, Path]:
    """Where the parts lie that a model of our own layout shares with others, as far as they are there."""
    paths = {name: manifest.shared_path(digest) for name, digest in shared.listed(folder).items()}
    return {name: path for name, path in paths.items() if path.is_file()}
