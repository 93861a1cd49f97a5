"""Choices by lot from a seed, for every world. Not in here: what is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Choices by lot from a seed, the same on every machine and numpy version.

    Only PCG64's raw 64-bit output is used: numpy promises that stream, and does not promise `Generator`'s methods.
    """

    __slots__ = ("_bits", "_stock")

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(seed[0] if len(seed) == 1 else seed)
        self._stock: list[int] = []

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        if not self._stock:
            self._stock = self._bits.random_raw(16).tolist()
        return (self._stock.pop() >> 11) * 2.0**-53

    def pick(self, options: Sequence[T]) -> T:
        """Return one of `options`, each equally likely."""
        return options[int(self.unit() * len(options))]

    def other(self, options: Sequence[T], taken: T) -> T:
        """Return one of `options` that is not `taken`."""
        return self.pick([option for option in options if option != taken])

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return self.unit() < probability
