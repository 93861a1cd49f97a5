"""The libraries that faces need, looked up when a face is: they are an extra. Not here: what is done with them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gesso.errors import MissingError

INSTALL = "pip install 'gesso[identity]'"


def opencv() -> Any:
    """OpenCV. Raises MissingError."""
    return _library("cv2", "OpenCV, which faces are aligned and drawn with,")


def onnxruntime() -> Any:
    """ONNX Runtime. Raises MissingError."""
    return _library("onnxruntime", "onnxruntime, which finds faces,")


def _library(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(what, INSTALL) from error
