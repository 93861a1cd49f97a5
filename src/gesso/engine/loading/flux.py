"""Puts a FLUX.1 together from a folder in diffusers' layout: networks strictly filled, their fit checked, a pipeline.

Reads local files only, and of weights only safetensors. Not here: names and places (`weights/catalogue`), text
encoders (`models/flux_text`), what the pipeline does, nano models (`flux_nano`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gesso.engine.device import default_device, has_fast_bfloat16
from gesso.errors import FileError, MissingError
from gesso.models.flux_text import FluxText, load_flux_text
from gesso.weights.catalogue import Entry, read_config
from gesso.weights.files import digest, fill, read_tensors

if TYPE_CHECKING:
    from gesso.pipelines.flux import FluxPipeline
    from gesso.pipelines.flux_state import FluxDefaults

_Network = TypeVar("_Network", bound=nn.Module)

_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_EDGE = 1024
# Text tokens: dev's, which knows guidance, and schnell's, which does not.
_LENGTH_DEV, _LENGTH_SCHNELL = 512, 256


def load_published(entry: Entry, device: str, dtype: torch.dtype) -> FluxPipeline:
    """FLUX.1 as its authors publish it for diffusers; what its files say decides whether it is dev or schnell.

    Raises FileError for a folder that holds something else or whose parts do not fit each other, WeightsError for
    weights that are incomplete, too many, damaged or of the wrong shape, MissingError without diffusers.
    """
    return _put_together(entry, device, dtype)


def plan_published(entry: Entry) -> FluxPipeline:
    """The same, to plan with and nothing else: networks have their shapes and no weights, which are not read."""
    bfloat16 = default_device() != "cpu" or has_fast_bfloat16()
    return _put_together(entry, "meta", torch.bfloat16 if bfloat16 else torch.float32)


def _put_together(entry: Entry, device: str, dtype: torch.dtype) -> FluxPipeline:
    folder, weights = entry.folder, device != "meta"
    called = read_config(folder, "model_index.json").get("_class_name")
    if called not in _PIPELINES:
        raise FileError(folder, f"holds diffusers' {called}, not a FLUX.1", f"one of {', '.join(_PIPELINES)} is wanted")
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        from gesso.pipelines.flux import FluxPipeline
    except ImportError as error:
        raise MissingError("diffusers, which holds FLUX's network,", "pip install 'gesso[diffusion]'") from error
    scheduler = _config(folder / "scheduler", _SCHEDULER, "scheduler_config.json")
    place = torch.device(device)
    transformer = _network(folder / "transformer", FluxTransformer2DModel, place, dtype)
    autoencoder = _network(folder / "vae", AutoencoderKL, place, dtype)
    values: Any = transformer.config
    length = _LENGTH_DEV if values["guidance_embeds"] else _LENGTH_SCHNELL
    text = load_flux_text(folder, device=device, dtype=dtype, length=length, weights=weights)
    _check_fit(folder, values, autoencoder.config, text)
    return FluxPipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        text=text,
        scheduler={name: value for name, value in scheduler.items() if not name.startswith("_")},
        defaults=_defaults(entry, distilled=not values["guidance_embeds"]),
        name=entry.name,
        digest=digest(_files(entry)) if weights else "",
    )


def _config(folder: Path, wanted: str, name: str = "config.json") -> dict[str, Any]:
    """A part's configuration. Raises FileError that names what the part is, if it is something else."""
    config: dict[str, Any] = read_config(folder, name)
    called = config.get("_class_name")
    if called != wanted:
        raise FileError(folder, f"holds diffusers' {called}, not {wanted}", "fetch it again")
    return config


def _network(folder: Path, kind: type[_Network], device: torch.device, dtype: torch.dtype) -> _Network:
    """A network of diffusers, made without memory and then, unless the device is "meta", given that of its file."""
    config = _config(folder, kind.__name__)
    known = inspect.signature(kind.__init__).parameters
    try:
        with torch.device("meta"):
            network = kind(**{name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(folder, f"its configuration makes no {kind.__name__} ({reason})", "fetch it again") from error
    if device.type != "meta":
        fill(network, _tensors(folder), folder)
    nn.Module.to(network, device, dtype)  # diffusers' own would warn of parts kept in float32, of which there are none
    return network.eval().requires_grad_(False)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a part: one file, or the shards of its index. Raises FileError, or WeightsError for damage."""
    index = folder / f"{_WEIGHTS}.index.json"
    if (folder / _WEIGHTS).is_file():
        return read_tensors(folder / _WEIGHTS)
    if not index.is_file():
        raise FileError(folder, f"holds no {_WEIGHTS}", "other formats are not read; fetch it again")
    state: dict[str, Tensor] = {}
    for name in _shards(index):
        state |= read_tensors(folder / name)
    return state


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, which lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(index, "is no index of shards", "fetch it again") from error
    if not all(isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") for name in names):
        raise FileError(index, "lists shards that are no .safetensors beside it", "fetch it again")
    return sorted(names)


def _check_fit(folder: Path, network: Mapping[str, Any], autoencoder: Mapping[str, Any], text: FluxText) -> None:
    """Whether each part takes what the one before it makes. Raises FileError."""
    features, pooled = text.widths
    made = 4 * autoencoder["latent_channels"]
    problem = ""
    if network["in_channels"] != made:
        problem = f"the transformer reads {network['in_channels']} channels where the autoencoder makes {made}"
    elif network["joint_attention_dim"] != features:
        problem = f"text features are {features} wide where the transformer reads {network['joint_attention_dim']}"
    elif network["pooled_projection_dim"] != pooled:
        problem = f"the pooled text is {pooled} wide where the transformer reads {network['pooled_projection_dim']}"
    if problem:
        raise FileError(folder, f"its parts do not fit: {problem}", "fetch it again")


def _defaults(entry: Entry, *, distilled: bool) -> FluxDefaults:
    from gesso.pipelines.flux_state import FluxDefaults

    size: dict[str, Any] = {"width": _EDGE, "height": _EDGE} | entry.defaults
    if distilled:
        return FluxDefaults(**{"steps": 4, "guidance": 0.0, "distilled": True, **size})
    return FluxDefaults(**{"steps": 28, "guidance": 3.5, **size})


def _files(entry: Entry) -> list[Path]:
    """Every file of the parts that are read, in order of their names."""
    parts = [entry.folder / name for name in entry.files]
    return sorted(path for part in parts for path in (part.rglob("*") if part.is_dir() else [part]) if path.is_file())
