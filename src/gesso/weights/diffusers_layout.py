"""Parts of a model's folder in diffusers' layout: configurations, and diffusers' networks, strict in field and name.

Reads local files only, and of weights only safetensors. Not here: which folders (`catalogue`), how shards are found
(`files`), schedules (`flow_schedule`), text encoders (`models/transformers_parts`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from gesso.devices import META
from gesso.errors import FileError, GessoError
from gesso.models import components
from gesso.models.diffusers_parts import autoencoder_kl
from gesso.models.kl_autoencoder import scaling_problem
from gesso.models.transformers_parts import reason
from gesso.weights.configuration import read_config
from gesso.weights.files import fill, read_tensors

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Network = TypeVar("Network", bound=nn.Module)

_MENDED = "fetch it again"


def part_config(folder: Path, wanted: str) -> dict[str, Any]:
    """A part's configuration without what diffusers adds. Raises FileError that names what the part is, if not this."""
    config = read_config(folder)
    called = config.get("_class_name")
    if called != wanted:
        raise FileError(folder, f"holds diffusers' {called}, not {wanted}", _MENDED)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def load_network(
    folder: Path, kind: type[Network], dtype: torch.dtype, *, weights: bool = True, idle: Container[str] = ()
) -> Network:
    """A network of diffusers, on the CPU; without `weights` it has its shapes and lies on the meta device.

    `idle` are fields that published configurations have, though diffusers' class never did anything with them.
    Raises FileError for a configuration of something else or of no network, WeightsError for weights that do not fit.
    """
    config = {name: value for name, value in part_config(folder, kind.__name__).items() if name not in idle}
    if unknown := sorted(set(config) - set(inspect.signature(kind.__init__).parameters)):
        raise FileError(folder, f"its configuration has unknown fields: {', '.join(unknown)}", "use a newer gesso")
    return filled(folder, kind.__name__, lambda: kind(**config), dtype, weights=weights)


def load_autoencoder(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> AutoencoderKL:
    """The autoencoder of a model's folder. Raises as `load_network`, and MissingError without diffusers."""
    part, kind = folder / "vae", autoencoder_kl()
    parameters = inspect.signature(kind.__init__).parameters
    config = part_config(part, kind.__name__)
    scale, shift = (config.get(name, parameters[name].default) for name in ("scaling_factor", "shift_factor"))
    if problem := scaling_problem(scale, shift):
        raise FileError(part / "config.json", problem, _MENDED)
    return load_network(part, kind, dtype, weights=weights)


def filled(
    folder: Path, name: str, make: Callable[[], Network], dtype: torch.dtype, *, weights: bool = True
) -> Network:
    """A network of that name made without memory and then, with `weights`, given the tensors of its folder.

    It may be one that another model has (`models/components`). Raises as `load_network`.
    """
    if not weights:
        return _filled(folder, name, make, dtype, weights=False)
    return components.shared(folder, name, dtype, lambda: _filled(folder, name, make, dtype, weights=weights))


def _filled(folder: Path, name: str, make: Callable[[], Network], dtype: torch.dtype, *, weights: bool) -> Network:
    try:
        with torch.device(META):
            network = make()
    except (GessoError, MemoryError):
        raise
    except Exception as error:  # sizes of any kind may fail anywhere in the layers they are made into
        problem = f"its configuration cannot be used: it makes no {name} ({reason(error)})"
        raise FileError(folder, problem, _MENDED) from error
    if weights:
        fill(network, read_tensors(folder, dtype=dtype, pickles=False, later=True), folder)
    nn.Module.to(network, dtype=dtype)  # diffusers' own would warn of parts kept in float32, of which there are none
    return network.eval().requires_grad_(False)
