"""Keys and values of the scales already made, preallocated for a batch of pictures in step with each other.

The last scale is never stored: nothing comes after it. Not here: which pictures share a batch (`engine`).
Shapes: R rows (one a picture and guidance branch), H heads, D head width, S tokens of all scales but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """One slab `[layers, 2, R, H, S, D]` in the network's dtype, allocated once a batch."""

    def __init__(self, slab: Tensor) -> None:
        self.slab = slab

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        tokens: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KeyValueCache:
        return cls(torch.empty((layers, 2, rows, heads, tokens, head_width), dtype=dtype, device=device))

    def view(self, start: int, rows: int) -> KeyValueCache:
        """Some neighbouring rows, sharing memory."""
        return KeyValueCache(self.slab[:, :, start : start + rows])

    @property
    def rows(self) -> int:
        return self.slab.shape[2]

    @property
    def bytes(self) -> int:
        return self.slab.nbytes

    @dataclass(frozen=True)
    class Layer:
        """One block's keys and values up to `start`, and whether what is added is kept."""

        slab: Tensor
        start: int
        keep: bool

        def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            """Past and new keys and values together, each `[R,H,start+n,D]`."""
            if self.start == 0 and not self.keep:
                return k, v
            if not self.keep:
                past = self.slab[..., : self.start, :]
                return torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            end = self.start + k.shape[2]
            self.slab[0, ..., self.start : end, :] = k
            self.slab[1, ..., self.start : end, :] = v
            both = self.slab[..., :end, :]
            return both[0], both[1]

    def layer(self, index: int, start: int, keep: bool) -> KeyValueCache.Layer:
        return KeyValueCache.Layer(self.slab[index], start, keep)


@dataclass(frozen=True)
class CacheRow:
    """Where one picture's branch lies: a slab shared with its company, and a row of it."""

    cache: KeyValueCache
    row: int


def gather(rows: Sequence[CacheRow], filled: int) -> KeyValueCache:
    """One cache whose rows are these, in order: the shared one, or neighbours within it, as they are; else a copy.

    Only the first `filled` tokens are copied. Company that stays together from scale to scale is never copied, nor
    are the conditional rows when guidance ends.
    """
    first, start = rows[0].cache, rows[0].row
    if all(row.cache is first and row.row == start + index for index, row in enumerate(rows)):
        return first if first.rows == len(rows) else first.view(start, len(rows))
    layers, _, _, heads, tokens, head_width = first.slab.shape
    joined = KeyValueCache.empty(layers, len(rows), heads, tokens, head_width, first.slab.dtype, first.slab.device)
    for index, row in enumerate(rows):
        joined.slab[:, :, index, :, :filled] = row.cache.slab[:, :, row.row, :, :filled]
    return joined
