"""The model that an option names, looked up before anything heavy is loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gesso.request import GenerationRequest

if TYPE_CHECKING:
    from gesso.weights.catalogue import Entry


def find_entry(options: Mapping[str, object]) -> "Entry":
    """The catalogue's entry of the model that the options name, or of the default one.

    Raises:
        RequestError: no such model; the nearest names are offered. Or it does not paint.
    """
    from gesso.weights import catalogue

    return catalogue.find_painter(str(options.get("model") or GenerationRequest.model_fields["model"].default))


def default_size(entry: "Entry") -> tuple[int, int] | None:
    """Width and height of the model's own pictures, None where its entry does not say."""
    width, height = entry.defaults.get("width"), entry.defaults.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def makes_videos(entry: "Entry") -> bool:
    """Whether what the model makes are videos."""
    from gesso.weights import catalogue

    return catalogue.makes_videos(entry)
