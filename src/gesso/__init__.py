"""Gesso: one engine for image-generation models. This file holds the public names, and nothing else.

Names are looked up on first use, so that `import gesso` (and `gesso --help`) loads no heavy library.

Example:
    >>> import gesso
    >>> gesso.GenerationRequest(prompt="two red stars above a blue ring", seed=7).model
    'infinity-nano'
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gesso import errors, events
    from gesso.engine import Engine, generate
    from gesso.events import Result
    from gesso.request import GenerationRequest

__version__ = "0.1.0"

__all__ = ["Engine", "GenerationRequest", "Result", "__version__", "errors", "events", "generate"]

# Public name -> the module it lives in; None marks a public module.
_HOMES: dict[str, str | None] = {
    "Engine": "gesso.engine",
    "GenerationRequest": "gesso.request",
    "Result": "gesso.events",
    "errors": None,
    "events": None,
    "generate": "gesso.engine",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gesso' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"gesso.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
