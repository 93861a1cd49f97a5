"""How much memory loaded models may take: what a budget is, and what the weights of pipelines come to.

Arithmetic and looking only. Which model goes for another is `fleet`'s to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from gesso.devices import META
from gesso.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

Budget = int | Literal["auto"] | None
"""Bytes; "auto" for what is free on the device; None for all that it takes until memory runs out."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([KMG]i?B)?", re.IGNORECASE)
_DEEPEST = 3  # objects between a pipeline and a network of its own


def parse_budget(value: int | str | None) -> Budget:
    """A budget as it is said: bytes, "24GB", "16 GiB", "auto", or None. Raises RequestError.

    Example:
        >>> parse_budget("1.5 GB")
        1500000000
    """
    if value is None or value == "auto":
        return value
    if not isinstance(value, bool):
        found = _AMOUNT.fullmatch(str(value).strip())
        if found and (count := int(float(found[1]) * _UNITS[(found[2] or "").upper()])) > 0:
            return count
    raise RequestError("model_budget", value, 'bytes above 0, an amount such as "24GB", or "auto"')


def weights_bytes(pipelines: Iterable[object]) -> int:
    """Bytes that the weights of pipelines take in memory, wherever they lie; what several share counts once."""
    seen: dict[tuple[str, int], int] = {}
    for pipeline in pipelines:
        for network in _networks(pipeline, _DEEPEST):
            for tensor in _tensors(network):
                if tensor.device.type != META:
                    storage = tensor.untyped_storage()
                    seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _networks(held: object, deeper: int) -> Iterator[nn.Module]:
    """The networks that a pipeline holds, some of them by way of what reads text or pictures for it."""
    from torch import nn

    if isinstance(held, nn.Module):
        yield held
    elif deeper and type(held).__module__.startswith("gesso."):
        for value in getattr(held, "__dict__", {}).values():
            yield from _networks(value, deeper - 1)
