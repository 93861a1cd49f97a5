"""A model that hubs of the tests serve, and pulling it into a place of the test's own."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from gesso.errors import GessoError
from gesso.weights import catalogue, hub, manifest
from gesso.weights.hub import Pulled
from gesso.weights.hub_clients import HubName

MODEL = "z-image-turbo"
REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
LARGE = "transformer/diffusion_pytorch_model.safetensors"
SIZE = 600_000
HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")


class Silent:
    """A watcher that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: tuple[int, int] | None = None
        self.moves: list[int] = []
        self.waited = threading.Event()

    def begin(self, total: int, here: int) -> None:
        self.begun = (total, here)

    def move(self, here: int) -> None:
        self.moves.append(here)

    def wait(self) -> None:
        self.waited.set()


def repository() -> dict[str, bytes]:
    """A model in diffusers' layout as small as can be, with files that are not to be fetched."""
    content = random.Random(7)
    files = {f"{part}/config.json": b'{"a": 1}' for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return {
        "model_index.json": b'{"_class_name": "ZImagePipeline"}',
        **files,
        LARGE: content.randbytes(SIZE),
        "vae/diffusion_pytorch_model.safetensors": content.randbytes(50_000),
        "tokenizer/merges.txt": b"",
        "README.md": b"no",
        "vae/run.py": b"no",
        "vae/model.bin": b"no",
        "whole.safetensors": b"the same weights once more",
    }


def pull(
    origin: HubName = "huggingface", revision: str | None = None, watcher: Silent | None = None, name: str = MODEL
) -> Pulled:
    return hub.pull(
        catalogue.find(name), origin=origin, revisions=[revision] if revision else (), watcher=watcher or Silent()
    )


def folder() -> Path:
    return catalogue.find(MODEL).folder


def files() -> dict[str, bytes]:
    """What lies in the model's folder under its own names."""
    found = {path.relative_to(folder()).as_posix(): path for path in folder().rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(manifest.UNFINISHED)}


def expected() -> dict[str, bytes]:
    unwanted = ("README.md", "vae/run.py", "vae/model.bin", "whole.safetensors")
    return {name: content for name, content in repository().items() if name not in unwanted}


def refusal(kind: type[GessoError], **options: object) -> str:
    """The one line of an error of exactly this kind."""
    with pytest.raises(kind) as caught:
        pull(**options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grown() -> int:
    """Bytes of the largest file that is being fetched; a small one may be done while it is looked at."""
    sizes = [0]
    for path in folder().glob(f"{manifest.UNFINISHED}/*.part"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)
