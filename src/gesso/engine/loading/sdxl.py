"""Puts a Stable Diffusion XL together, from a folder in diffusers' layout or from a single file of the original naming.

Reads local files only, and of weights only safetensors. Not here: names and places (`weights/catalogue`), the single
file (`weights/sdxl_file`), text encoders (`models/sdxl_text`), what the pipeline does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gesso.engine.loading import sdxl_refiner
from gesso.engine.loading.build import Build
from gesso.engine.loading.weights_digest import weights_digest
from gesso.errors import FileError, GessoError, MissingError
from gesso.models.diffusers_parts import unet_2d_condition
from gesso.models.sdxl_text import ENCODERS, TOKENIZER_FILES, TOKENIZERS, SdxlText, assemble, load_sdxl_text
from gesso.sampling import noise_schedulers
from gesso.weights import catalogue
from gesso.weights.catalogue import Entry
from gesso.weights.configuration import read_config, whole_number
from gesso.weights.diffusers_layout import load_autoencoder, load_network
from gesso.weights.files import check_shards
from gesso.weights.infinity import parse
from gesso.weights.noise_schedule import NAME, NoiseSchedule, read_noise_schedule
from gesso.weights.sdxl_file import part_folder, read_parts

if TYPE_CHECKING:
    from gesso.pipelines.sdxl import SdxlPipeline

_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
_LATENT_EDGE = 128  # of a picture of 1024 pixels, at which Stable Diffusion XL was trained
_SIZES = 6  # numbers about a picture's size that the network reads
_SIZE_WIDTH = "addition_time_embed_dim"  # what a configuration calls the width of each
_TOKENIZER_SOURCE = "stabilityai/stable-diffusion-xl-base-1.0"


def load_published(entry: Entry, build: Build) -> SdxlPipeline:
    """A Stable Diffusion XL in diffusers' layout.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    folder, weights, dtype = entry.folder, build.weights, build.dtype
    index = read_config(folder, "model_index.json")
    called = index.get("_class_name")
    if called not in _PIPELINES:
        wanted = f"one of {', '.join(_PIPELINES)} is wanted"
        raise FileError(folder, f"holds diffusers' {called}, not a Stable Diffusion XL", wanted)
    schedule = read_noise_schedule(folder / "scheduler")
    unet = load_network(folder / "unet", unet_2d_condition(), dtype, weights=weights)
    autoencoder = load_autoencoder(folder, _pixel_dtype(folder / "vae", dtype), weights=weights)
    for part in ENCODERS if weights else ():
        check_shards(folder / part)
    text = load_sdxl_text(folder, device=torch.device(build.device), dtype=dtype, weights=weights)
    zero_empty = bool(index.get("force_zeros_for_empty_prompt", True))
    scheduler = read_config(folder / "scheduler", NAME)
    return _put_together(entry, build, unet, autoencoder, text, schedule, zero_empty, scheduler)


def load_file(entry: Entry, build: Build) -> SdxlPipeline:
    """A Stable Diffusion XL in a single file, the first of the entry's.

    Raises as `load_published`, and MissingError with the command that fetches the tokenizers where none are here.
    """
    path = entry.folder / entry.files[0]
    pixel_dtype = _pixel_dtype(part_folder(path.parent, "vae"), build.dtype)
    parts = read_parts(path, build.dtype, pixel_dtype, weights=build.weights)
    text = assemble(parts.small, parts.large, _tokenizers(path), torch.device(build.device))
    scheduler = read_config(part_folder(path.parent, "scheduler", NAME), NAME)
    return _put_together(entry, build, parts.unet, parts.autoencoder, text, parts.schedule, True, scheduler)


def _put_together(
    entry: Entry,
    build: Build,
    unet: Any,
    autoencoder: Any,
    text: SdxlText,
    schedule: NoiseSchedule,
    zero_empty: bool,
    scheduler: Mapping[str, object],
) -> SdxlPipeline:
    """The pipeline of parts that fit each other; `scheduler` is the model's own, which is used where none is said."""
    _check_fit(entry.folder, unet.config, autoencoder.config, text)
    build.place({"text_encoder": text.small, "text_encoder_2": text.large, "unet": unet, "autoencoder": autoencoder})
    from gesso.pipelines.sdxl import SdxlPipeline  # needs diffusers, which was looked for by now
    from gesso.pipelines.sdxl_state import SdxlDefaults

    stride = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
    edge = _latent_edge(entry.folder, unet.config["sample_size"]) * stride
    own = noise_schedulers.name_of(scheduler)
    defaults: dict[str, object] = {"width": edge, "height": edge}
    if own:
        defaults["scheduler"] = own
    return SdxlPipeline(
        unet=unet,
        autoencoder=autoencoder,
        text=text,
        scheduler=schedule.values(),
        defaults=parse(SdxlDefaults, defaults | entry.defaults, entry.folder),
        device=torch.device(build.device),
        dtype=build.dtype,
        name=entry.name,
        digest=weights_digest(entry) if build.weights else "",
        zero_empty=zero_empty,
        refiner=sdxl_refiner.guest(build, autoencoder.config["latent_channels"], text),
    )


def _latent_edge(folder: Path, said: object) -> int:
    """Latent pixels along the edge of a picture where no size is asked for. Raises FileError."""
    # diffusers' UNets say none unless told otherwise.
    return _LATENT_EDGE if said is None else whole_number(folder / "unet", "sample_size", said)


def _pixel_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """That of an autoencoder: float32 where half of the numbers would overflow, which is diffusers' default."""
    return torch.float32 if read_config(folder).get("force_upcast", True) else dtype


def _tokenizers(path: Path) -> Path:
    """The folder with both tokenizers: the file's own, or that of another Stable Diffusion XL that is here.

    They are all one vocabulary, CLIP's. Raises MissingError.
    """
    for folder in _places(path):
        if all(any((folder / part / name).is_file() for name in TOKENIZER_FILES) for part in TOKENIZERS):
            return folder
    what = f"CLIP's tokenizer, which {path} is read with (folders {' and '.join(TOKENIZERS)} beside it),"
    place = shlex.quote(str(path.parent))
    raise MissingError(what, f"hf download {_TOKENIZER_SOURCE} --include 'tokenizer*/*' --local-dir {place}")


def _places(path: Path) -> Iterator[Path]:
    """Where tokenizers for a single file may lie, its own folder first; others are looked up only if these are not."""
    yield path.parent
    for name in catalogue.names():
        entry = None
        with suppress(GessoError):  # an entry of the user's that cannot be used: it has no tokenizers for this one
            entry = catalogue.find(name)
        if entry is not None and entry.family == "sdxl":
            yield entry.folder


def _check_fit(folder: Path, network: Mapping[str, Any], autoencoder: Mapping[str, Any], text: SdxlText) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    features, pooled = text.widths
    made = autoencoder["latent_channels"]
    inside, hint = (network["in_channels"], network["out_channels"]), "fetch it again"
    if network["addition_embed_type"] != "text_time" or network["time_cond_proj_dim"] is not None:
        problem = "its UNet reads something else than a text and a picture's sizes"
        raise FileError(folder, problem, "only SDXL's base models and what was made of them are painted with")
    numbers = _SIZES * whole_number(folder / "unet", _SIZE_WIDTH, network[_SIZE_WIDTH])
    sizes = network["projection_class_embeddings_input_dim"] - numbers
    problem = ""
    if inside not in ((made, made), (2 * made + 1, made)):
        problem = f"the UNet reads {inside[0]} channels and makes {inside[1]} where the autoencoder has {made}"
    elif network["cross_attention_dim"] != features:
        problem = f"text features are {features} wide where the UNet reads {network['cross_attention_dim']}"
    elif sizes != pooled:
        problem = f"the pooled text is {pooled} wide where the UNet reads {sizes}"
    elif autoencoder.get("latents_mean") is not None or autoencoder.get("latents_std") is not None:
        problem, hint = "its autoencoder has latents_mean or latents_std", "no model with these is supported"
    if problem:
        raise FileError(folder, f"its parts do not fit: {problem}", hint)
