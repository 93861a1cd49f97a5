"""The one place that puts a model together: a name to its entry, its loader, a dtype, and a pipeline on the device.

Here: the table of loaders and the choice of a dtype. One file a family beside this one, imported only when a model of
that family is loaded, since some bring heavy libraries. Not here: names and places (`weights/catalogue`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from gesso.devices import CPU, META, check_dtype, kind_of
from gesso.engine.acceleration import PLAIN, Acceleration
from gesso.engine.device import check_device, default_device, has_fast_bfloat16
from gesso.engine.loading.build import Build
from gesso.engine.memory import asking, choose, is_small, most_held
from gesso.engine.planning import planned
from gesso.errors import WeightsError
from gesso.memory_modes import AUTO, FULL, MemoryMode, parse_mode
from gesso.pipelines.contract import Pipeline
from gesso.request import GenerationRequest
from gesso.weights import catalogue, digests, manifest
from gesso.weights.catalogue import Entry
from gesso.weights.files import files_of

# (family, layout) -> the module beside this one and its loader.
_LOADERS: dict[tuple[str, str], tuple[str, str]] = {
    ("infinity", "gesso"): ("infinity", "load_own"),
    ("infinity", "infinity"): ("infinity", "load_published"),
    ("flux", "gesso"): ("flow_nano", "load_own"),
    ("flux", "diffusers"): ("flux", "load_published"),
    ("z-image", "gesso"): ("flow_nano", "load_own"),
    ("z-image", "diffusers"): ("z_image", "load_published"),
    ("hunyuan-video", "diffusers"): ("hunyuan_video", "load_published"),
    ("qwen-image", "diffusers"): ("qwen_image", "load_published"),
    ("sdxl", "diffusers"): ("sdxl", "load_published"),
    ("sdxl", "file"): ("sdxl", "load_file"),
}


def load_pipeline(
    name_or_path: str,
    device: str,
    dtype: str | None = None,
    *,
    acceleration: Acceleration | None = None,
    memory: str = AUTO,
    shared: bool = True,
) -> Pipeline:
    """The pipeline of a catalogue name or a model's folder, its weights on the device.

    `dtype` is that of the large matmuls; None is float32 for nano models and on processors without bfloat16, else
    bfloat16. `acceleration` is put onto its networks; what of it does not run here is found before weights are read.
    `memory` is a memory mode by name; "auto" takes one by what is free and what the request needs that the model is
    loaded for. Parts that another pipeline holds are used again, unless it is not to be `shared`: then it may be taken
    apart. Raises RequestError, FileError, WeightsError, OutOfMemoryError before anything is read where that mode would
    not fit, or MissingError with the command that fetches what is missing.
    """
    entry = _complete_entry(name_or_path)
    chosen, wanted = _dtype(entry, check_device(device), dtype), acceleration or PLAIN
    wanted.check(device, chosen)
    mode = memory_mode(name_or_path, device, dtype, memory)
    build = Build(device=device, dtype=chosen, memory=mode, acceleration=wanted, shared=shared)
    if entry.layout != "gesso":  # which is checked against its manifest
        digests.begin(files_of(entry.folder, entry.files))
    with build.reading():
        pipeline = _load(entry, build)
        check_pulled(entry)  # last, since files are hashed beside the loading
    return pipeline


def load_planner(name_or_path: str, device: str | None = None, dtype: str | None = None) -> Pipeline:
    """A pipeline that can plan and nothing else: networks have their shapes and no weights, which are not read.

    `device` is the one that is planned for, which decides the dtype if that is None. Raises as `load_pipeline` does.
    """
    entry = _complete_entry(name_or_path)
    chosen = _dtype(entry, check_device(device or default_device()), dtype)
    return _load(entry, Build(device=META, dtype=chosen))


def measure(name_or_path: str, device: str, dtype: str | None = None, memory: str = AUTO) -> int | None:
    """About how many bytes the weights of a model take on the device, at most at once in the memory mode; None where
    nobody knows before they are there.

    Raises as `load_pipeline` does for a model that is not here.
    """
    entry = _complete_entry(name_or_path)
    mode = FULL if memory == AUTO else parse_mode(memory)
    count = sum(entry.count_parameters().values())
    if (mode != FULL or not count) and (held := most_held(load_planner(name_or_path, device, dtype), mode)):
        return held
    return count * _dtype(entry, check_device(device), dtype).itemsize or None


def memory_mode(
    name_or_path: str,
    device: str,
    dtype: str | None = None,
    memory: str = AUTO,
    requests: Sequence[GenerationRequest] = (),
) -> MemoryMode:
    """The memory mode that a model is loaded in for requests: as asked for or, for "auto", by what is free.

    Without requests it is for the one that it is loaded for now (`engine/memory`), or for its default size. Raises
    OutOfMemoryError where the mode surely does not fit, and as `load_pipeline` does.
    """
    entry = _complete_entry(name_or_path)
    plain = FULL if memory == AUTO else parse_mode(memory)
    if is_small(sum(path.stat().st_size for path in files_of(entry.folder, entry.files))):
        return plain
    planner = load_planner(name_or_path, device, dtype)
    default = asking() or GenerationRequest(prompt="a picture", model=name_or_path)
    plans = [planned(planner, request) for request in requests or [default]]
    return choose(memory, planner, max(plans, key=lambda plan: plan.peak_bytes), device)


def check_pulled(entry: Entry) -> None:
    """Refuse a pulled model whose files are not those that were pulled; loaders of our own layout do it themselves."""
    if not entry.sources or not (entry.folder / manifest.NAME).is_file():
        return
    parts = tuple(f"{part}/" for part in entry.files)
    listed = [name for name in manifest.names(entry.folder) if f"{name}/".startswith(parts)]
    try:
        manifest.verify(entry.folder, tuple(listed))
    except WeightsError as error:
        raise WeightsError(entry.folder, detail=f"{error.detail}; mend it with: {entry.fetch}") from error


def _load(entry: Entry, build: Build) -> Pipeline:
    module, loader = _LOADERS[entry.family, entry.layout]
    pipeline = getattr(import_module(f"{__name__}.{module}"), loader)(entry, build)
    pipeline.build = build
    return pipeline


def _complete_entry(name_or_path: str) -> Entry:
    """The catalogue's entry of a model whose files are all here."""
    entry = catalogue.find_painter(name_or_path)
    entry.require_files()
    return entry


def _dtype(entry: Entry, device: str, asked: str | None) -> torch.dtype:
    """As asked for; else float32 for models that are small or on a processor without bfloat16 matmuls, bfloat16."""
    if asked is not None:
        return getattr(torch, check_dtype(asked))
    if entry.layout == "gesso" or (kind_of(device) == CPU and not has_fast_bfloat16()):
        return torch.float32
    return torch.bfloat16
