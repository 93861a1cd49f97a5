"""How settings of tasks and of the loop are held against their bounds. Not here: any setting."""

from __future__ import annotations

from gesso.errors import RequestError

MOST_SCENES = 1 << 20
"""Scenes that are held at once, or stored: more of them fit no machine that trains a nano model."""


def check(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise RequestError for a setting whose value does not hold."""
    if not holds:
        raise RequestError(name, value, allowed)
