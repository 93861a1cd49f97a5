"""What a model's parts weigh, and how much memory a picture needs at once in each memory mode.

Here: bytes of parts, counted when they are placed, before any of them is quantized; and sums of these and of what the
stages of a picture hold beside weights, which its plan says (`Plan.activations`). Not here: what stages hold
(`pipelines`), what is free, and what is chosen (`engine/memory`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from gesso.memory_modes import MemoryMode
from gesso.weights.placing import AUTOENCODER, PICTURES, TEXT, WHOLE, are_apart, is_quantized, is_reader, tile_edge
from gesso.weights.quantize import linear_layers, quantized_bytes
from gesso.weights.residency import Unit, divide

_RGB_BYTES = 12  # of a pixel in float32


@dataclass(frozen=True)
class Bytes:
    """Of one part: `always` there, `stem` while the part works, the largest of its blocks, and the whole.

    `temporary` are those of its largest linear layer, which 8-bit weights are made into for a product.
    """

    always: int
    stem: int
    block: int
    whole: int
    temporary: int = 0

    def working(self, mode: MemoryMode) -> int:
        """While the part works, beside `always`."""
        return self.stem + self.block if mode.placement == "group-offload" else self.whole - self.always


@dataclass
class Footprint:
    """Bytes of the parts of one model by role, as they are and in 8 bits.

    Guests are parts that are read when a request first wants them; they count for plans that name them
    (`Plan.guests`), and once they are there for every plan. `tile` are the pixels along the edge of the autoencoder's
    tiles, 0 where tiling changes nothing.
    """

    plain: dict[str, Bytes] = field(default_factory=dict)
    quantized: dict[str, Bytes] = field(default_factory=dict)
    tile: int = 0
    _guests: dict[str, tuple[Bytes, Bytes]] = field(default_factory=dict)

    def add(self, role: str, part: nn.Module) -> None:
        """Count a part that is not quantized yet."""
        self.plain[role], self.quantized[role] = _weighed(role, part)
        if role == AUTOENCODER:
            self.tile = tile_edge(part)

    def expect(self, role: str, part: nn.Module | int) -> None:
        """Count a guest: a network, or so many bytes that are there all the time."""
        if isinstance(part, int):
            always = Bytes(part, 0, 0, part)
            self._guests[role] = (always, always)
        else:
            self._guests[role] = _weighed(role, part)

    def forget(self, role: str) -> None:
        """Count a part no longer that was let go of."""
        self.plain.pop(role, None)
        self.quantized.pop(role, None)

    def weights(self, mode: MemoryMode, guests: Collection[str] = ()) -> int:
        """Bytes of all parts, wherever they rest."""
        return sum(part.whole for part in self._parts(mode, guests).values())

    def peak(
        self, mode: MemoryMode, activations: Mapping[str, int], size: tuple[int, int], guests: Collection[str] = ()
    ) -> int:
        """The most memory on the device for one picture of this width and height.

        `activations` are bytes beside weights by stage ("text", "picture", "step", "decode"); a stage of another name
        is taken for every part's.
        """
        parts = self._parts(mode, guests)
        always = sum(part.always for part in parts.values())
        most = 0
        for role, part in parts.items():
            there = {name: other for name, other in parts.items() if not are_apart(role, name, mode)}
            held = sum(other.working(mode) for other in there.values())
            beside = max((taken for stage, taken in activations.items() if _takes_part(role, stage)), default=0)
            if mode.tiling and role == AUTOENCODER and self.tile:
                beside = _tiled(beside, *size, self.tile)
            most = max(most, always + held + beside + part.temporary)
        return most

    def host(self, mode: MemoryMode, guests: Collection[str] = ()) -> int:
        """The most host memory on a machine whose device has memory of its own: what rests there."""
        return 0 if mode.placement == "full" else self.weights(mode, guests)

    def _parts(self, mode: MemoryMode, guests: Collection[str]) -> dict[str, Bytes]:
        expected = {role: both[bool(mode.scheme)] for role, both in self._guests.items() if role in guests}
        return (self.quantized if mode.scheme else self.plain) | expected  # which takes the place of another


def _takes_part(role: str, stage: str) -> bool:
    if stage == "text":
        return role.startswith(TEXT)
    if stage == "picture":
        return role in (PICTURES, AUTOENCODER)
    if stage == "decode":
        return role == AUTOENCODER
    return stage != "step" or not (is_reader(role) or role == AUTOENCODER)


def _tiled(whole: int, width: int, height: int, edge: int) -> int:
    """Of `whole` bytes, what decoding holds tile by tile: a tile's share beside the tiles before it, in float32; and in
    the end all of them, joined to rows and these to a picture. Tiles overlap by a quarter, as in diffusers.
    """
    rows, columns = ([min(edge, length - at) for at in range(0, length, edge * 3 // 4)] for length in (height, width))
    most, kept = 0, 0
    for pixels in (high * wide for high in rows for wide in columns):
        most, kept = max(most, kept + whole * pixels // (width * height)), kept + _RGB_BYTES * pixels
    return min(whole, max(most, kept + 2 * _RGB_BYTES * width * height))


def _weighed(role: str, part: nn.Module) -> tuple[Bytes, Bytes]:
    """A part as it is, and as it is where 8 bits are asked for."""
    plain = _weigh(part, quantized=False)
    return plain, _weigh(part, quantized=True) if is_quantized(role) else plain


def _weigh(part: nn.Module, *, quantized: bool) -> Bytes:
    division = divide(part, by_blocks=True)
    layers = [getattr(*place) for place in linear_layers(part, without=WHOLE)] if quantized else []
    less = {id(layer): _saved(layer) for layer in layers}

    def of(unit: Unit) -> int:
        saved = sum(less.get(id(module), 0) for module in unit.modules)
        return sum(slot.value.nbytes for slot in unit.slots) - saved

    always = sum(slot.value.nbytes for slot in division.fixed) + sum(buffer.nbytes for buffer in part.buffers())
    stem, blocks = of(division.stem), [of(block) for block in division.blocks]
    temporary = max((layer.weight.nbytes for layer in layers), default=0)
    return Bytes(always, stem, max(blocks, default=0), always + stem + sum(blocks), temporary)


def _saved(layer: nn.Linear) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters()) - quantized_bytes(layer)
