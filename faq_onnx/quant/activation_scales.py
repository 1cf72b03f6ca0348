"""Steps of activations in 16-bit integers, symmetric, one for a whole tensor.

Sixteen bits are many where the largest value is some hundred times as large as the others, and
few where it is ten thousand times: decoders have such places. So it is told of every tensor how
much of each token the step takes, and products where that is much can be left in floats.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST_CODE", "MARGIN", "ActivationRange"]

LARGEST_CODE = 32767
MARGIN = 2.0  # what other text may go beyond, one bit of the 16 (docs/targets.md)


@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """How large an activation became.

    Attributes:
        largest: Largest size of any value.
        channels: Its last dimension.
        energies: Sum of squares of each token, float64 [tokens].
    """

    largest: float
    channels: int
    energies: npt.NDArray[np.float64]

    def join(self, other: ActivationRange) -> ActivationRange:
        """Of both texts."""
        energies = np.concatenate([self.energies, other.energies])
        return ActivationRange(max(self.largest, other.largest), self.channels, energies)

    @property
    def step(self) -> float:
        """Of the integers, > 0: a float32."""
        step = np.float32(self.largest * MARGIN / LARGEST_CODE)
        return float(max(step, np.finfo(np.float32).tiny))

    @property
    def noise(self) -> float:
        """Rounding to the step over the size of a token: root of the mean square over tokens.

        Rounding errors are uniform in a step, so their mean square is step^2 / 12 a channel.
        Tokens without energy have no size, and are left out.
        """
        energies = self.energies[self.energies > 0]
        if not len(energies):
            return 0.0
        rounding = self.step**2 / 12 * self.channels
        return float(np.sqrt(np.mean(rounding / energies)))
