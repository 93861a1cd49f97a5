"""A safety checker from a folder as its authors publish it: configuration, preprocessor, safetensors. Strict, local.

Two kinds are told apart by `config.json`: `StableDiffusionSafetyChecker`, and transformers' image classifiers. Pictures
are prepared by Pillow and not by torchvision, so that answers do not depend on what is installed.
Not here: names and fetching (`weights/catalogue`), deciding (`concepts`, `labels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gesso.devices import CPU, kind_of
from gesso.errors import FileError, MissingError
from gesso.models.diffusers_parts import INSTALL, safety_checker
from gesso.models.transformers_parts import quiet, read_automatic, read_network, usable
from gesso.safety.concepts import ConceptChecker
from gesso.safety.decisions import Checker
from gesso.safety.labels import LabelChecker
from gesso.weights.configuration import read_config
from gesso.weights.headers import read_header

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
"""What a folder has to hold."""

_CONCEPTS, _CLASSIFIER = "StableDiffusionSafetyChecker", "ForImageClassification"
_MENDED = "get one with: gesso models pull stable-diffusion-safety-checker"


def read_checker(folder: Path, device: str, *, unsafe: Sequence[str], threshold: float) -> Checker:
    """The checker of a folder, on the device: in float32 on a CPU, in float16 elsewhere, as it is published to be run.

    Args:
        folder: with `FILES` in it.
        device: where it looks at pictures.
        unsafe: labels that count as unsafe, of a classifier.
        threshold: share of these above which a picture is flagged.

    Raises:
        FileError: something is missing in the folder, or it holds no checker.
        WeightsError: its weights do not fit.
        MissingError: a library is not installed.
        RequestError: a classifier without one of these labels.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FileError(folder, f"holds no safety checker (no {name})", _MENDED)
    kind = _kind(folder)
    place = torch.device(device)
    with quiet():
        network: Any = read_network(kind, folder, _dtype(device))
        processor = _processor(folder)
    if kind.__name__ == _CONCEPTS:
        checker: Checker = ConceptChecker(network, processor, place)
    else:
        checker = LabelChecker(network, processor, place, unsafe=unsafe, threshold=threshold)
    checker.network.to(place)
    return checker


def checker_bytes(folder: Path, device: str) -> int:
    """What the weights of a folder's checker take on a device; none are read. Raises FileError, WeightsError."""
    tensors = read_header(folder / FILES[-1])
    return sum(tensor.count for tensor in tensors.values()) * _dtype(device).itemsize


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if kind_of(device) == CPU else torch.float16


def _kind(folder: Path) -> Any:
    """The class of the network, by the folder's own word."""
    named = read_config(folder).get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "nothing that is named"
    if name == _CONCEPTS:
        return safety_checker()
    transformers = _transformers()
    if not (name.endswith(_CLASSIFIER) and hasattr(transformers, name)):
        raise FileError(folder, f"holds {name}, no {_CONCEPTS} and no classifier of pictures", _MENDED)
    return getattr(transformers, name)


def _processor(folder: Path) -> Any:
    automatic = _transformers().AutoImageProcessor
    return usable(folder, lambda: read_automatic(automatic, folder, backend="pil"))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingError("transformers, which the safety checker needs,", INSTALL) from error
    return transformers
