"""Scales of an int8 key/value cache: the largest value of a channel, over 127.

Keys are rotated before they are cached. Of a rotary pair (c, c + head_dim / 2) the length stays
and the direction follows the position, so both channels get the pair's largest length: it holds
at every position, also at those that were not seen.
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
        channels: Largest size of each channel, float32 [heads, head_dim].
        pairs: Largest length of the rotary pair that it belongs to, same shape.
    """

    channels: Floats
    pairs: Floats

    @classmethod
    def of(cls, values: npt.NDArray[np.floating]) -> CacheRange:
        """Of cached keys or values [heads, T, head_dim]; head_dim is even."""
        squares = np.square(values.astype(np.float32))
        half = squares.shape[2] // 2
        lengths = np.sqrt((squares[..., :half] + squares[..., half:]).max(axis=1))
        return cls(np.sqrt(squares.max(axis=1)), np.concatenate([lengths, lengths], axis=1))

    def join(self, other: CacheRange) -> CacheRange:
        """Of both."""
        return CacheRange(
            np.maximum(self.channels, other.channels), np.maximum(self.pairs, other.pairs)
        )

    def scales(self, *, rotated: bool) -> Floats:
        """One for each channel, float32 [heads * head_dim], > 0."""
        sizes = (self.pairs if rotated else self.channels).reshape(-1)
        floor = np.finfo(np.float32).tiny
        scales: Floats = np.maximum(sizes * np.float32(MARGIN / LARGEST_CODE), floor)
        return scales
