"""How is a number drawn so that every machine draws the same one? SplitMix64 over a SHA-256 seed, integers only.

Python's and numpy's generators do not promise the same values in every future version; this one is its own definition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Dice:
    """A stream of integers that depends on `text` alone.

    The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

    Args:
        text: names the stream, e.g. "scene:train:17".
    """

    def __init__(self, text: str) -> None:
        self._state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return z ^ (z >> 31)

    def below(self, bound: int) -> int:
        """An integer in 0 .. bound - 1."""
        return (self._next() * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in low .. high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 draws."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of `items` in a drawn order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def grid(self, shape: tuple[int, ...], bound: int) -> npt.NDArray[np.int64]:
        """An array of integers in 0 .. bound - 1 (bound at most 2**16)."""
        count = int(np.prod(shape))
        steps = np.arange(1, count + 1, dtype=np.uint64)
        z = np.uint64(self._state) + steps * np.uint64(_GOLDEN)
        self._state = int(z[-1])
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        z = z ^ (z >> np.uint64(31))
        drawn = ((z >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)
        return drawn.astype(np.int64).reshape(shape)
