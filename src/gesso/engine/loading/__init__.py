"""The one place that puts a model together: a name to its entry, its loader, a dtype, and a pipeline on the device.

Here: the table of loaders and the choice of a dtype. One file a family beside this one, imported only when a model of
that family is loaded, since some bring heavy libraries. Not here: names and places (`weights/catalogue`).
"""

from __future__ import annotations

from importlib import import_module

import torch

from gesso.engine.device import default_device, has_fast_bfloat16
from gesso.engine.loading.build import Build
from gesso.errors import RequestError
from gesso.pipelines.contract import Pipeline
from gesso.weights import catalogue
from gesso.weights.catalogue import Entry

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

# (family, layout) -> the module beside this one and its loader.
_LOADERS: dict[tuple[str, str], tuple[str, str]] = {
    ("infinity", "gesso"): ("infinity", "load_own"),
    ("infinity", "infinity"): ("infinity", "load_published"),
    ("flux", "gesso"): ("flow_nano", "load_own"),
    ("flux", "diffusers"): ("flux", "load_published"),
    ("z-image", "gesso"): ("flow_nano", "load_own"),
    ("z-image", "diffusers"): ("z_image", "load_published"),
}
# Whose sizes are in the weights: there is no planning without reading them.
_SIZED_BY_WEIGHTS = {("infinity", "infinity")}


def load_pipeline(name_or_path: str, device: str, dtype: str | None = None) -> Pipeline:
    """The pipeline of a catalogue name or a model's folder, its weights on the device.

    `dtype` is that of the large matmuls; None is float32 for nano models and on processors without bfloat16, else
    bfloat16.
    Raises RequestError, FileError, WeightsError, or MissingError with the command that fetches what is missing.
    """
    entry = _complete_entry(name_or_path)
    if dtype is not None and dtype not in _DTYPES:
        raise RequestError("dtype", dtype, "a dtype that is known", f"one of: {', '.join(_DTYPES)}")
    chosen = _DTYPES[dtype] if dtype else _default_dtype(entry, device)
    return _load(entry, Build(device=device, dtype=chosen))


def load_planner(name_or_path: str, device: str | None = None) -> Pipeline | None:
    """A pipeline that can plan and nothing else: networks have their shapes and no weights, which are not read.

    `device` is the one that is planned for, which decides the dtype. None where the sizes are in the weights. Raises as
    `load_pipeline` does.
    """
    entry = _complete_entry(name_or_path)
    if (entry.family, entry.layout) in _SIZED_BY_WEIGHTS:
        return None
    return _load(entry, Build(device="meta", dtype=_default_dtype(entry, device or default_device())))


def _load(entry: Entry, build: Build) -> Pipeline:
    module, loader = _LOADERS[entry.family, entry.layout]
    return getattr(import_module(f"{__name__}.{module}"), loader)(entry, build)


def _complete_entry(name_or_path: str) -> Entry:
    """The catalogue's entry of a model whose files are all here."""
    entry = catalogue.find(name_or_path)
    entry.require_files()
    return entry


def _default_dtype(entry: Entry, device: str) -> torch.dtype:
    """float32 for models that are small or on a processor without bfloat16 matmuls, else bfloat16."""
    if entry.layout == "gesso" or (device == "cpu" and not has_fast_bfloat16()):
        return torch.float32
    return torch.bfloat16
