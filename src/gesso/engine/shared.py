"""``generate``: the shortest way to a picture, through one engine that the process keeps between calls."""

from __future__ import annotations

import os
import threading

from gesso.engine.engine import Engine
from gesso.events import Result
from gesso.request import parse_request

_lock = threading.Lock()
_engine: Engine | None = None


def generate(prompt: str, **fields: object) -> list[Result]:
    """Paint a prompt. The first call loads the model; it stays loaded for the calls that follow.

    Args:
        prompt: what to paint, 1 to 2000 characters.
        fields: any other field of ``GenerationRequest``.

    Returns:
        One result an image: ``.image`` (RGB), ``.seed``, ``.metadata``, ``.save(path)``.

    Raises:
        RequestError: a field that is unknown or has a value that cannot be used.
        GessoError: whatever made it fail.

    Example:
        >>> import gesso
        >>> result = gesso.generate("two red stars above a blue ring", seed=7)[0]
        >>> result.seed, result.image.mode
        (7, 'RGB')
    """
    return shared_engine().run(parse_request({"prompt": prompt, **fields}))


def shared_engine() -> Engine:
    """The engine that ``generate`` uses: made on first use, closed when the interpreter exits."""
    global _engine
    with _lock:
        if _engine is None:
            _engine = Engine()
        return _engine


def _forget_after_fork() -> None:
    """A forked child inherits the engine without its thread, and the lock as it happened to be; it starts anew."""
    global _engine, _lock
    _engine, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
