"""What a LoRA learns from, made once: a latent of each picture and features of each caption, kept in the run's folder.

A file each, named after what it is made of, written aside and renamed: a run that was killed makes only those that are
missing, and so does one whose data has grown. Text encoders are needed no more then. Not here: pictures and captions
(`data`), what is learned (`objectives`).
Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from gesso.devices import CPU, META
from gesso.engine.device import release_memory
from gesso.errors import FileError, WeightsError
from gesso.files import ready_folder, written_aside
from gesso.pipelines.planning import text_networks
from gesso.training.lora.data import Example, pixels
from gesso.weights.files import read_tensors

Row = tuple[Tensor, ...]
"""What a text encoder says of one text: features, and what else its family reads."""

FOLDER = "material"
_EDITION = 1  # another one when what is stored changes
_MOST_HELD = 1 << 31  # bytes in memory; beyond, files are read when they are wanted


class RememberedText:
    """A pipeline's text encoder that says again what it has said, also once its networks are gone.

    Every text is read by itself, so that what is said of it does not depend on its company.
    """

    def __init__(self, encoder: Any, device: torch.device | str) -> None:
        self._encoder, self._known = encoder, dict[str, Row]()
        self._read: Callable[..., Any] = encoder.encode if hasattr(encoder, "encode") else encoder.features
        self._arguments = (device,) if "device" in inspect.signature(self._read).parameters else ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def row(self, text: str) -> Row:
        """Of one text."""
        if text not in self._known:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be learned from
                read = self._read([text], *self._arguments)
            self._known[text] = tuple(part[0] for part in (read if isinstance(read, tuple) else (read,)))
        return self._known[text]

    def encode(self, texts: Sequence[str], *_device: object) -> Row:
        """As encoders that pad all texts to one length."""
        return tuple(torch.stack(column) for column in zip(*map(self.row, texts), strict=True))

    def features(self, texts: Sequence[str], *_device: object) -> list[Tensor]:
        """As encoders that give each text its own length."""
        return [self.row(text)[0] for text in texts]

    def networks(self) -> list[nn.Module]:
        """Those that read."""
        return text_networks(self._encoder)

    def let_go(self) -> None:
        """Free the networks; the encoder can still count tokens."""
        for network in self.networks():
            network.to(META)
        release_memory()


class Material:
    """Latents and text features of a pipeline at one size: from memory, from the run's folder, or made now.

    `latents_of` makes `[1,C,h,w]` of a picture `[1,3,H,W]` in [-1,1]. `identity` names all that they depend on besides
    the pictures and captions themselves.
    """

    def __init__(
        self, latents_of: Callable[[Tensor], Tensor], text: RememberedText, size: tuple[int, int], identity: str
    ) -> None:
        self._latents_of, self._text, self._size = latents_of, text, size
        self._name = _hashed(f"{_EDITION} {size} {identity}")[:16]
        self._folder: Path | None = None
        self._held: dict[str, Row] = {}
        self._bytes = 0

    def open(self, folder: Path) -> None:
        """Keep in a run's folder from now on. Raises FileError where it cannot be written to."""
        whole = ready_folder(folder / FOLDER)
        for other in whole.iterdir():
            if other.name != self._name:  # of another model or size
                shutil.rmtree(other, ignore_errors=True)
        self._folder = ready_folder(whole / self._name)
        for left in self._folder.glob(".gesso-*"):  # of runs that were killed while writing
            left.unlink(missing_ok=True)

    def latent(self, example: Example) -> Tensor:
        """Of a picture, `[C,h,w]` float32 on the CPU. Raises FileError for one that cannot be read."""
        return self._found(f"picture-{example.digest}", lambda: (self._encoded(example),))[0]

    def text(self, caption: str) -> Row:
        """Of a caption, on the CPU, in the encoder's dtypes."""
        return self._found(f"text-{_hashed(caption)}", lambda: self._text.row(caption))

    def _encoded(self, example: Example) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self._latents_of(pixels(example, *self._size))[0].float()

    def _found(self, name: str, make: Callable[[], Row]) -> Row:
        if name in self._held:
            return self._held[name]
        row = self._read(name)
        if row is None:
            row = tuple(part.to(CPU, copy=True).contiguous() for part in make())
            self._write(name, row)
        size = sum(part.nbytes for part in row)
        if self._folder is None or self._bytes + size <= _MOST_HELD:
            self._held[name] = row
            self._bytes += size
        return row

    def _read(self, name: str) -> Row | None:
        """What lies in the folder, None where nothing does or it is damaged."""
        if self._folder is None:
            return None
        try:
            parts = read_tensors(self._folder / f"{name}.safetensors", pickles=False)
            return tuple(parts[str(index)] for index in range(len(parts)))
        except (FileError, WeightsError, KeyError):
            return None

    def _write(self, name: str, row: Row) -> None:
        if self._folder is not None:
            content = save({str(index): part for index, part in enumerate(row)})
            with written_aside(self._folder / f"{name}.safetensors") as aside:
                aside.write_bytes(content)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
