"""KL divergence of logits from a reference's, with the reference's softmax taken once.

For logits l of the reference and m, both minus the largest of their row, and Z = sum_v exp(.):
    KL = sum_v p_v (l_v - m_v) - log Z_l + log Z_m,   p = exp(l) / Z_l
Exponentials and differences are taken in float32, everything is summed in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import NonFiniteError

__all__ = ["ShiftedLogits", "pieces"]

# float32 work arrays of 2 MB: near the caches, and memory that is used again. Four of 4 MB are
# handed back to the system and zeroed anew each time, which takes longer than the exponentials.
PIECE_ELEMENTS = 1 << 19


@dataclasses.dataclass(frozen=True)
class ShiftedLogits:
    """What a model predicts at some positions.

    Attributes:
        values: Logits minus the largest of each row, float32 [positions, vocabulary].
        exponentials: exp(values).
        sums: Of the exponentials of each row, float64 [positions].
        best: Token of the largest logit, int64 [positions].
    """

    values: npt.NDArray[np.float32]
    exponentials: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float64]
    best: npt.NDArray[np.int64]

    @classmethod
    def of(cls, logits: npt.NDArray[np.floating], *, whose: str, way_out: str) -> ShiftedLogits:
        """Shift logits [positions, vocabulary].

        Args:
            logits: Of any float type; they are left alone.
            whose: Begins the error.
            way_out: Ends it.

        Raises:
            NonFiniteError: NaN or infinite logits.
        """
        best = logits.argmax(axis=1)
        largest = np.take_along_axis(logits, best[:, np.newaxis], axis=1)
        # argmax stops at the first NaN, so the largest shows it
        if not np.isfinite(largest).all():
            bad = int((~np.isfinite(largest)).sum())
            msg = f"{whose} are not finite at {bad} of {len(largest)} positions; {way_out}"
            raise NonFiniteError(msg)
        values = np.subtract(logits, largest, dtype=np.float32)
        exponentials = np.exp(values)
        return cls(values, exponentials, exponentials.sum(axis=1, dtype=np.float64), best)

    @property
    def log_sums(self) -> npt.NDArray[np.float64]:
        """Log Z: what `values` lack to be minus log-probabilities, float64 [positions]."""
        log_sums: npt.NDArray[np.float64] = np.log(self.sums)
        return log_sums

    def rows(self, piece: slice) -> ShiftedLogits:
        """Views of some positions."""
        return ShiftedLogits(
            self.values[piece], self.exponentials[piece], self.sums[piece], self.best[piece]
        )

    def kl(self, other: ShiftedLogits) -> npt.NDArray[np.float64]:
        """KL(self || other) of each position, nats, float64 [positions].

        Rounding can leave equal predictions a few 1e-8 below 0.

        Args:
            other: At the same positions; its exponentials are spent as the work array.
        """
        work = np.subtract(self.values, other.values, out=other.exponentials)
        np.multiply(work, self.exponentials, out=work)
        mean: npt.NDArray[np.float64] = work.sum(axis=1, dtype=np.float64) / self.sums
        kl: npt.NDArray[np.float64] = mean - self.log_sums + other.log_sums
        return kl


def pieces(positions: int, vocabulary: int) -> Iterator[slice]:
    """Stretches of positions whose logits fit the caches."""
    step = max(1, PIECE_ELEMENTS // vocabulary)
    for start in range(0, positions, step):
        yield slice(start, start + step)
