"""Scales of an int8 key/value cache: the largest value of a channel, over 127.

Keys are rotated before they are cached. Of a rotary pair (c, c + pairs) the length stays and the
direction follows the position, so both channels get the pair's largest length: it holds at every
position, also at those that were not seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST_CODE", "MARGIN", "CacheRange"]

Floats = npt.NDArray[np.float32]

MARGIN = 1.05  # what other text may go beyond
LARGEST_CODE = 127


@dataclasses.dataclass(frozen=True)
class CacheRange:
    """How large cached values became.

    Attributes:
        sizes: Largest size of each channel, or length of the rotary pair that it belongs to,
            float32 [heads, head_dim].
    """

    sizes: Floats

    @classmethod
    def of(cls, values: npt.NDArray[np.floating], pairs: int) -> CacheRange:
        """Of cached keys or values [heads, T, head_dim], the first 2 * pairs channels rotated."""
        squares = np.square(values.astype(np.float32))
        low, high, rest = np.split(squares, [pairs, 2 * pairs], axis=2)
        lengths = low + high
        largest = np.concatenate([lengths, lengths, rest], axis=2).max(axis=1)
        return cls(np.sqrt(largest))

    def join(self, other: CacheRange) -> CacheRange:
        """Of both."""
        return CacheRange(np.maximum(self.sizes, other.sizes))

    @property
    def scales(self) -> Floats:
        """One for each channel, float32 [heads * head_dim], > 0."""
        floor = np.finfo(np.float32).tiny
        factor = np.float32(MARGIN / LARGEST_CODE)
        scales: Floats = np.maximum(self.sizes.reshape(-1) * factor, floor)
        return scales
