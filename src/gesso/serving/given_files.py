"""Files that a call names, by address or data URI: pictures and masks to the size that is painted, and LoRAs.

What strangers write is never opened as a path of this machine, and addresses are asked through the one guard
(`gesso.network`). Not here: which fields there are (`flux_compatible`), fetching of LoRAs (`adapters/store`).
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from gesso.adapters.sources import Site, Source, parse, quotable
from gesso.adapters.sources_archive import extract, is_archive
from gesso.adapters.sources_sites import persistent
from gesso.adapters.store import AdapterStore, Wishes
from gesso.errors import FileError, RequestError, RunError
from gesso.files import inside
from gesso.network import Network, NetworkError, shown
from gesso.pictures import LARGEST_PICTURE, cover_crop, read_pixels
from gesso.request_parts import Lora
from gesso.settings import load_settings

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_PICTURE = 64 << 20  # bytes of one that is fetched
_SHOWN = 40  # characters of what was given
_RECORDED = 1000  # characters of an address
_PICTURE_FORM = "an address or a data URI of a picture"
_NO_FILES = "files of the server are not to be named here"


@dataclass(frozen=True, kw_only=True)
class Fetching:
    """What fetching needs to know of one call.

    `folder` takes the files, `stop` ends it. `tokens` are the caller's own, by site. LoRAs in `lora_folder` may be
    named by their paths in it.
    """

    folder: Path
    stop: threading.Event
    tokens: Mapping[Site, str] = field(default_factory=dict, repr=False)
    lora_folder: Path | None = None


def given_pictures(image: str, mask: str | None, size: tuple[int, int], fetching: Fetching) -> tuple[Path, Path | None]:
    """A picture and its mask as files of width and height `size`: scaled until they cover it, and cut about the middle.

    A mask of another size than its picture is stretched to it first; where it is transparent it is black.
    Raises RequestError, FileError and RunError by the field's name; CancelledError.
    """
    picture = _picture("image", image, fetching)
    target = fetching.folder / "image.png"
    cover_crop(picture, *size, "image").save(target)
    if mask is None:
        return target, None
    marks = _picture("mask", mask, fetching, background="black")
    if picture.width * marks.height > LARGEST_PICTURE:  # what Pillow holds while it stretches
        hint = f"image has {picture.width}x{picture.height}; give both the same shape"
        raise RequestError("mask", f"{marks.width}x{marks.height} pixels", "of about the shape of image", hint)
    if marks.size != picture.size:
        marks = marks.resize(picture.size)
    mask_target = fetching.folder / "mask.png"
    cover_crop(marks, *size, "mask").save(mask_target)
    return target, mask_target


def recorded_name(text: str) -> str:
    """What a record calls a picture that was given: its address, without account and query, or "data URI".

    The file that it became goes with the call.
    """
    text = text.strip()
    return "data URI" if text.lower().startswith("data:") else shown(text)[:_RECORDED]


def given_lora(name: str, text: str, scale: float | None, fetching: Fetching) -> Lora:
    """One LoRA of a call, for the engine. With a token of the caller's for its site it is fetched here, else there.

    Args:
        name: of the field, for errors.
        text: a source; "owner/model[/VERSION]" is Replicate's, as predictors have it; or a data URI of an archive or a
            file.
        scale: how strongly it acts.
        fetching: of the call.

    Raises:
        RequestError: it names nothing that may be used.
        GessoError: it was fetched here, and did not come or cannot be used.
    """
    if text.strip().lower().startswith("data:"):
        return Lora(source=str(_unpacked(name, text.strip(), fetching)), scale=scale)
    try:
        source = parse(text, bare="replicate")
        if source.scale is not None and scale not in (None, 1.0):
            raise RequestError(f"{name}'s scale", scale, "usable here", f"the source says {source.scale:g} already")
        scale = scale if source.scale is None else source.scale
        if source.path is not None:
            return Lora(source=str(_in_folder(source.path, fetching.lora_folder)), scale=scale)
        if source.site in fetching.tokens:
            wishes = Wishes(family="sdxl", tokens={source.site: fetching.tokens[source.site]})
            adapter = AdapterStore().ensure(source, wishes, cancelled=fetching.stop).adapter
            return Lora(source=str(adapter.path), scale=scale)
    except RequestError as error:
        field_name = name if error.field == "source" else error.field
        raise RequestError(field_name, error.value, error.allowed, error.hint) from None
    return Lora(source=_spelled(source), scale=scale)


def _spelled(source: Source) -> str:
    """A source so that nobody takes it for another: with its site, and whole where it is an address."""
    if source.site == "url":
        return source.url + (f"#{source.file}" if source.file else "")
    return f"hf:{source.shown}" if source.site == "huggingface" else source.shown


def _in_folder(path: Path, folder: Path | None) -> Path:
    """A file of the folder whose files may be named. Raises RequestError."""
    if folder is None:
        raise RequestError("source", str(path), "allowed", f"{_NO_FILES}; GESSO_PREDICTOR_LORA_FOLDER names a folder")
    try:
        found = inside(folder, str(path)).resolve()
    except FileError:
        raise RequestError("source", str(path), "a file of the folder of LoRAs", _NO_FILES) from None
    if not found.is_file():
        raise RequestError("source", str(path), "a file of the folder of LoRAs")
    return found


def _unpacked(name: str, uri: str, fetching: Fetching) -> Path:
    """The safetensors file of a data URI: itself, or the only one of a tar. Raises RequestError, RunError."""
    path = fetching.folder / f"{name.replace(' ', '-')}.given"
    path.write_bytes(_data(name, uri, "a data URI with a tar or a safetensors file"))
    whole = path.with_suffix(".safetensors")
    if is_archive(path):
        extract(path, "", whole, name=name, limit=int(load_settings().largest_adapter))
        path.unlink()
    else:
        path.rename(whole)
    return whole


def _picture(name: str, value: str, fetching: Fetching, background: str = "white") -> Image:
    """The pixels of a picture that was given, on `background`. Raises RequestError, RunError, CancelledError."""
    text = value.strip()
    if text.lower().startswith("data:"):
        content = _data(name, text, _PICTURE_FORM)
    elif text.lower().startswith(("https://", "http://")):
        content = _fetched(name, text, fetching)
    else:
        raise RequestError(name, quotable(text)[:_SHOWN], _PICTURE_FORM, _NO_FILES)
    path = fetching.folder / f"{name}.given"
    path.write_bytes(content)
    try:
        return read_pixels(path, background)
    except FileError as error:
        what = text.partition(",")[0][:_SHOWN] if text.lower().startswith("data:") else shown(text)
        raise RequestError(name, what, "a picture", f"it {error.problem}") from None


def _data(name: str, uri: str, allowed: str) -> bytes:
    """The bytes of a data URI (RFC 2397). Raises RequestError."""
    head, comma, body = uri.partition(",")
    try:
        if not comma or not body:
            raise ValueError
        if head.lower().endswith(";base64"):
            return base64.b64decode(unquote_to_bytes(body), validate=True)
        return unquote_to_bytes(body)
    except (ValueError, binascii.Error):
        raise RequestError(name, f"{head[:_SHOWN]},…", allowed, "it is cut off, or no base64") from None


def _fetched(name: str, url: str, fetching: Fetching) -> bytes:
    """What lies at an address. Raises RequestError, RunError, CancelledError."""
    with Network(
        allow_private=load_settings().allow_private_addresses, plain_http=True, cancelled=fetching.stop
    ) as network:

        def read() -> bytes:
            body = bytearray()
            with network.open(url) as answer:
                for piece in answer.pieces:
                    body += piece
                    if len(body) > _LARGEST_PICTURE:
                        message = f"{shown(url)} is larger than {_LARGEST_PICTURE >> 20} MiB"
                        raise NetworkError(message, passing=False)
            return bytes(body)

        try:
            return persistent(lambda: network.interruptible(read), network.stop)
        except RequestError as error:
            raise RequestError(name, error.value, error.allowed, error.hint) from None
        except NetworkError as error:
            raise RunError(f"{name} did not come: {error}") from None
