"""The nano recogniser from a folder that our trainer exports, alone or in a model that uses it; strictly filled.

Not here: the network (`models/face_recogniser`), published recognisers (`infinite_you`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from gesso.models import components, face_recogniser
from gesso.models.face_recogniser import FaceRecogniser, FaceRecogniserConfig
from gesso.weights import manifest, shared
from gesso.weights.configuration import read_config
from gesso.weights.files import read_tensors
from gesso.weights.infinity import filled, parse

FILE = "recogniser.safetensors"


def load_recogniser(folder: Path) -> FaceRecogniser:
    """In float32, on the CPU, for evaluation. Raises FileError, WeightsError."""
    config = read_config(folder)
    values = config.get("recogniser") if "recogniser" in config else config.get("network")
    parsed = parse(FaceRecogniserConfig, values, folder)
    manifest.verify(folder, (FILE,))
    path = shared.part(folder, FILE)
    kind = f"{face_recogniser.build.__module__}.build"
    return components.shared(
        path, kind, torch.float32, lambda: filled(face_recogniser.build, parsed, read_tensors(path), path), parsed
    )
