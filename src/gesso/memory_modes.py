"""Memory modes by name: where a model's parts rest while they are not at work, 8-bit weights, and tiles for decoding.

A mode is words joined by "+": at most one placement, at most one kind of 8-bit weights, and "tiling". Placements never
change a picture; the others do, a little. Here: the words and what they mean. Not here: what is done about them
(`weights/residency`), what they need (`weights/footprint`), which is chosen (`engine/memory`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gesso.errors import RequestError

AUTO = "auto"

Placement = Literal["full", "offload", "model-offload", "group-offload"]
PLACEMENTS: dict[Placement, str] = {
    "full": "everything stays on the device",
    "offload": "text encoders are away while the network works, and it while they do",
    "model-offload": "each part is away while another works",
    "group-offload": "of each part only the block that works is there",
}
SCHEMES = {
    "8bit": "linear layers of the network and of large text encoders in int8, by InfiniteYou's rule",
    "torchao-int8": "the same by torchao",
    "torchao-fp8": "likewise in 8-bit floating point",
}
TILING = "tiling"
HELP = "auto, full, offload, 8bit, offload+8bit; or model-offload, group-offload, torchao-int8, torchao-fp8, +tiling."


@dataclass(frozen=True)
class MemoryMode:
    """A placement, a kind of 8-bit weights ("" for none), and whether decoding goes tile by tile.

    Example:
        >>> str(MemoryMode("offload", "8bit"))
        'offload+8bit'
        >>> str(MemoryMode())
        'full'
    """

    placement: Placement = "full"
    scheme: str = ""
    tiling: bool = False

    def __str__(self) -> str:
        placement = "" if self.placement == "full" and (self.scheme or self.tiling) else self.placement
        return "+".join(word for word in (placement, self.scheme, TILING if self.tiling else "") if word)


FULL = MemoryMode()

EXACT = tuple(MemoryMode(placement) for placement in PLACEMENTS)
"""The modes whose pictures are those of `full` to the last bit: what `auto` chooses from, fastest first."""

SHOWN = (
    *EXACT,
    MemoryMode(scheme="8bit"),
    *(MemoryMode(placement, "8bit") for placement in PLACEMENTS if placement != "full"),
)
"""The modes that `gesso plan` foresees and that an error may propose."""


def parse_mode(text: str) -> MemoryMode:
    """The mode of a name; "auto" is none. Raises RequestError.

    Example:
        >>> parse_mode("8bit+offload")
        MemoryMode(placement='offload', scheme='8bit', tiling=False)
    """
    placements: list[Placement] = []
    schemes: list[str] = []
    tiling = False
    for word in text.split("+"):
        if word in PLACEMENTS:
            placements.append(word)
        elif word in SCHEMES:
            schemes.append(word)
        elif word == TILING and not tiling:
            tiling = True
        else:
            raise _unknown(text)
    if len(placements) > 1 or len(schemes) > 1:
        raise _unknown(text)
    return MemoryMode(placements[0] if placements else "full", schemes[0] if schemes else "", tiling)


def check_memory(text: str) -> str:
    """The name itself, if it is "auto" or a mode's. Raises RequestError."""
    if text != AUTO:
        parse_mode(text)
    return text


def _unknown(text: str) -> RequestError:
    words = f"{', '.join(PLACEMENTS)}; {', '.join(SCHEMES)}; {TILING}"
    return RequestError("memory", text, "a memory mode", f'auto, or one of each joined by "+": {words}')
