"""Every model by name: its family, where its files lie, its licence and defaults. Data, and the look-up.

A name is one of the catalogue's, or the path of a folder with a model in it. Not here: reading tensors (`files`),
putting a model together (`engine/loading`), fetching it (`hub`): a missing model names the command that does.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gesso.errors import FileError, MissingError, RequestError
from gesso.settings import load_settings
from gesso.weights import manifest, shared
from gesso.weights.configuration import read_config

Layout = Literal["gesso", "infinity", "diffusers"]

_LONGEST_NAME = 80  # characters of a name that an error repeats


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one repository of a hub: those whose names one of `patterns` matches, as the shell would ("*", "?").

    `folder` is where they go below the entry's. `modelscope` is the repository's name there, "" where none is known.
    """

    repository: str
    patterns: tuple[str, ...]
    folder: str = ""
    modelscope: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model. `folder` holds its files; `files` are what must lie there, `size` their bytes where known.

    `sources` are where a hub has them, and `fetch` is the command that gets them: none for what ships or is a user's.

    `layout` says how they are named: by our trainers, as Infinity's authors publish them, or as diffusers does.
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
    sources: tuple[Source, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)

    def missing_files(self) -> list[str]:
        """Which of `files` lie neither in `folder` nor, for models that ship, in the room of shared parts."""
        elsewhere = _shared_parts(self.folder) if self.layout == "gesso" else {}
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


@dataclass(frozen=True, kw_only=True)
class _Diffusers:
    """A published model in diffusers' layout; defaults that the files themselves tell are not repeated here."""

    family: str
    description: str
    repository: str
    licence: str
    parts: tuple[str, ...]
    edge: int = 1024


ZOO = Path(__file__).parent.parent / "zoo"
_OWN_FILES = {
    "infinity": ("transformer.safetensors", "text.safetensors", "tokenizer.safetensors"),
    "flux": ("transformer.safetensors", "text.safetensors", "autoencoder.safetensors"),
    "z-image": ("transformer.safetensors", "text.safetensors", "autoencoder.safetensors"),
}
_NANO = {
    name: f"{what} of the shapes world at 64 pixels, trained by this project; needs no download"
    for name, what in {"infinity-nano": "Infinity", "flux-nano": "FLUX"}.items()
}

# name -> (description, transformer, tokenizer, pixels of the default size's edge)
_INFINITY: dict[str, tuple[str, str, str, int]] = {
    "infinity-2b": ("Infinity 2B, 1 megapixel", "infinity_2b_reg.pth", "infinity_vae_d32_reg.pth", 1024),
    "infinity-8b": ("Infinity 8B, 1 megapixel", "infinity_8b_weights", "infinity_vae_d56_f8_14_patchify.pth", 1024),
    "infinity-8b-512": (
        "Infinity 8B, 0.25 megapixels", "infinity_8b_512x512_weights", "infinity_vae_d56_f8_14_patchify.pth", 512,
    ),
}  # fmt: skip
_TEXT_FOLDER = "flan-t5-xl"

_ONE_TEXT = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_TWO_TEXTS = (*_ONE_TEXT, "text_encoder_2", "tokenizer_2")
_DIFFUSERS = {
    "z-image-turbo": _Diffusers(
        family="z-image",
        description="Z-Image Turbo, 6B: 8 steps, no guidance",
        repository="Tongyi-MAI/Z-Image-Turbo",
        licence="Apache-2.0",
        parts=_ONE_TEXT,
    ),
    "z-image": _Diffusers(
        family="z-image",
        description="Z-Image, 6B: 50 steps, guidance and negative prompts",
        repository="Tongyi-MAI/Z-Image",
        licence="Apache-2.0",
        parts=_ONE_TEXT,
    ),
    "flux-dev": _Diffusers(
        family="flux",
        description="FLUX.1 [dev], 12B: 28 steps, guidance distilled",
        repository="black-forest-labs/FLUX.1-dev",
        licence="FLUX.1 [dev] Non-Commercial",
        parts=_TWO_TEXTS,
    ),
    "flux-schnell": _Diffusers(
        family="flux",
        description="FLUX.1 [schnell], 12B: 4 steps, no guidance",
        repository="black-forest-labs/FLUX.1-schnell",
        licence="Apache-2.0",
        parts=_TWO_TEXTS,
    ),
}
# What `model_index.json` calls a pipeline -> its family here.
_CLASSES = {
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "ZImagePipeline": "z-image",
    "ZImageImg2ImgPipeline": "z-image",
    "ZImageOmniPipeline": "z-image",
}


def names() -> list[str]:
    """All names, what ships with Gesso first."""
    return [*_NANO, *_INFINITY, *_DIFFUSERS]


def find(name_or_path: str) -> Entry:
    """The entry of a name, or one made for the folder of a model.

    Raises RequestError for an unknown name (with the nearest ones), FileError for a path that holds no model.
    """
    if name_or_path in _NANO:
        return _of_folder(ZOO / name_or_path, name_or_path)
    if name_or_path in _INFINITY:
        return _infinity(name_or_path)
    if name_or_path in _DIFFUSERS:
        return _diffusers(name_or_path, _DIFFUSERS[name_or_path])
    looks_like_path = "/" in name_or_path or "\\" in name_or_path or name_or_path.startswith((".", "~"))
    try:
        if looks_like_path or Path(name_or_path).exists():
            return _of_folder(_expanded(name_or_path), name_or_path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        shown = name_or_path if len(name_or_path) <= _LONGEST_NAME else f"{name_or_path[:_LONGEST_NAME]}…"
        problem = f"cannot be read ({(error.strerror or str(error)).lower()})"
        raise FileError(shown, problem, "name a model of the catalogue or a folder with one") from error
    near = difflib.get_close_matches(name_or_path, names(), n=2)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    raise RequestError("model", name_or_path, "a known model", f"{suggestion}(gesso models lists {len(names())})")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # "~somebody" where nobody has that name
        raise FileError(path, "no such folder", "name a model of the catalogue or a folder with one") from error


def _of_folder(folder: Path, name: str) -> Entry:
    """A model of our own layout, described by its `config.json`, or of diffusers', by its `model_index.json`."""
    if (folder / "model_index.json").is_file():
        return _of_diffusers_folder(folder, name)
    config = read_config(folder)
    family = str(config.get("family"))
    if family not in _OWN_FILES:
        known = ", ".join(_OWN_FILES)
        raise FileError(folder, f"holds a model of the family {family}", f"families that can be painted with: {known}")
    shipped, shared_parts = folder.parent == ZOO and folder.name in _NANO, _shared_parts(folder)
    generation = config.get("generation")
    return Entry(
        name=name,
        family=family,
        description=_NANO[folder.name] if shipped else "trained with gesso train",
        licence="Apache-2.0" if shipped else "yours",
        source="ships with gesso" if shipped else "local folder",
        folder=folder,
        layout="gesso",
        files=("config.json", "manifest.json", *_OWN_FILES[family]),
        size=sum(path.stat().st_size for path in (*folder.iterdir(), *shared_parts.values()) if path.is_file()),
        defaults=dict(generation) if isinstance(generation, dict) else {},
    )


def _shared_parts(folder: Path) -> dict[str, Path]:
    """Where the parts lie that a model of our own layout shares with others, as far as they are there."""
    paths = {name: manifest.shared_path(digest) for name, digest in shared.listed(folder).items()}
    return {name: path for name, path in paths.items() if path.is_file()}


def _of_diffusers_folder(folder: Path, name: str) -> Entry:
    """A folder in diffusers' layout, whose index names the pipeline."""
    called = str(read_config(folder, "model_index.json").get("_class_name"))
    if called not in _CLASSES:
        known = ", ".join(sorted(set(_CLASSES.values())))
        raise FileError(folder, f"holds diffusers' {called}", f"families that can be painted with: {known}")
    family = _CLASSES[called]
    return Entry(
        name=name,
        family=family,
        description=f"{family} in diffusers' layout",
        licence="see its folder",
        source="local folder",
        folder=folder,
        layout="diffusers",
        files=_TWO_TEXTS if family == "flux" else _ONE_TEXT,
    )


def _diffusers(name: str, published: _Diffusers) -> Entry:
    folder = load_settings().home / "weights" / name
    return Entry(
        name=name,
        family=published.family,
        description=published.description,
        licence=published.licence,
        source=published.repository,
        folder=folder,
        layout="diffusers",
        files=published.parts,
        fetch=f"gesso models pull {name}",
        sources=(
            # Some repositories hold the same weights once more as a single file; the parts are what is read.
            Source(
                repository=published.repository,
                patterns=(published.parts[0], *(f"{part}/*" for part in published.parts[1:])),
                modelscope=published.repository,
            ),
        ),
        defaults={"width": published.edge, "height": published.edge},
    )


def _infinity(name: str) -> Entry:
    description, transformer, tokenizer, edge = _INFINITY[name]
    folder = load_settings().home / "weights" / name
    return Entry(
        name=name,
        family="infinity",
        description=description,
        licence="MIT",
        source="FoundationVision/Infinity, google/flan-t5-xl",
        folder=folder,
        layout="infinity",
        files=(transformer, tokenizer, _TEXT_FOLDER),
        fetch=f"gesso models pull {name}",
        sources=(
            Source(repository="FoundationVision/Infinity", patterns=(transformer, f"{transformer}/*", tokenizer)),
            Source(
                repository="google/flan-t5-xl", patterns=("*.json", "*.model", "*.safetensors"), folder=_TEXT_FOLDER
            ),
        ),
        defaults={"width": edge, "height": edge, "guidance": 3.0, "temperature": 0.5 if "2b" in name else 1.0},
    )
