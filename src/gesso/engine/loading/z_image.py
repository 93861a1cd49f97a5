"""Puts a Z-Image together from a folder in diffusers' layout: networks strictly filled, their fit checked, a pipeline.

Not here: names and places (`weights/catalogue`), strictness (`weights/z_image`), what the pipeline does, nano models
(`flow_nano`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gesso.engine.loading.build import Build
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError
from gesso.models.qwen_text import QwenText
from gesso.models.s3dit.config import S3DiTConfig
from gesso.models.s3dit.packing import padded
from gesso.models.siglip_pictures import SiglipPictures
from gesso.pipelines.z_image import ZImagePipeline
from gesso.pipelines.z_image_state import BASE, EDIT, TURBO, ZImageDefaults
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config
from gesso.weights.flow_schedule import read_schedule
from gesso.weights.infinity import parse
from gesso.weights.z_image import PICTURE_PARTS, load_autoencoder, load_pictures, load_text, load_transformer

_PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageOmniPipeline")
_TURBO_SHIFT = 3.0  # published models differ in this alone: Turbo's is 3, that of those with guidance is 6


def load_published(entry: Entry, build: Build) -> ZImagePipeline:
    """Z-Image as its authors publish it for diffusers; its files say whether it is Turbo, Base or one that edits.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    return _put_together(entry, build)


def _put_together(entry: Entry, build: Build) -> ZImagePipeline:
    folder, weights, dtype = entry.folder, build.weights, build.dtype
    called = read_config(folder, "model_index.json").get("_class_name")
    if called not in _PIPELINES:
        wanted = f"one of {', '.join(_PIPELINES)} is wanted"
        raise FileError(folder, f"holds diffusers' {called}, not a Z-Image", wanted)
    shift = read_schedule(folder / "scheduler")
    parts = picture_parts(folder)
    transformer = load_transformer(folder, dtype, weights=weights)
    autoencoder = load_autoencoder(folder, weights=weights)
    text = load_text(folder, dtype, weights=weights)
    pictures = load_pictures(folder, dtype) if weights and parts else None
    values: Any = autoencoder.config
    _check_fit(entry, transformer.config, values["latent_channels"], text, pictures)
    readers = {} if pictures is None else {"picture_encoder": pictures.network}
    build.place({"text_encoder": text.network, **readers, "transformer": transformer, "autoencoder": autoencoder})
    return ZImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        shift=shift,
        defaults=_defaults(entry, editing=called == "ZImageOmniPipeline", distilled=shift.shift <= _TURBO_SHIFT),
        name=entry.name,
        digest=weights_digest(entry) if weights else "",
        pictures=pictures,
        device=build.device,
        dtype=dtype,
    )


def picture_parts(folder: Path) -> tuple[str, ...]:
    """The folders of what reads pictures, for a network that wants their features. Raises FileError without them."""
    if read_config(folder / "transformer").get("siglip_feat_dim") is None:
        return ()
    if absent := [name for name in PICTURE_PARTS if not (folder / name).is_dir()]:
        problem = f"lacks {', '.join(absent)}, where its transformer reads features of pictures (siglip_feat_dim)"
        raise FileError(folder, problem, "fetch it again")
    return PICTURE_PARTS


def _check_fit(
    entry: Entry, network: S3DiTConfig, latent_channels: int, text: QwenText, pictures: SiglipPictures | None
) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    problem = ""
    if network.in_channels != latent_channels:
        problem = f"the transformer reads {network.in_channels} channels where the autoencoder makes {latent_channels}"
    elif network.cap_feat_dim != text.width:
        problem = f"text features are {text.width} wide where the transformer reads {network.cap_feat_dim}"
    elif padded(text.max_tokens) + 1 >= network.axes_lens[0]:
        problem = f"a prompt of {text.max_tokens} tokens is beyond the transformer's {network.axes_lens[0]} positions"
    elif pictures is not None and network.siglip_feat_dim != pictures.width:
        problem = f"picture features are {pictures.width} wide where the transformer reads {network.siglip_feat_dim}"
    if problem:
        raise FileError(entry.folder, f"its parts do not fit: {problem}", "fetch it again")


def _defaults(entry: Entry, *, editing: bool, distilled: bool) -> ZImageDefaults:
    kind = EDIT if editing else TURBO if distilled else BASE
    parse(ZImageDefaults, entry.defaults, entry.folder)
    return replace(kind, **entry.defaults)  # pyright: ignore[reportArgumentType]
