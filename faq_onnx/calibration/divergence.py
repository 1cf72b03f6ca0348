"""KL divergence of many logits from one reference, with the reference's softmax taken once."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import NonFiniteError

__all__ = ["ReferenceDistribution"]

Floats = npt.NDArray[np.float32]

PIECE_ELEMENTS = 1 << 20  # float32 work arrays of 4 MB, near enough to the caches


@dataclasses.dataclass(frozen=True)
class ReferenceDistribution:
    """What a float model predicts at some positions.

    Attributes:
        logits: float32 [positions, vocabulary], minus the largest of each row.
        exponentials: exp(logits).
        sums: float64 [positions], of the exponentials.
    """

    logits: Floats
    exponentials: Floats
    sums: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: npt.NDArray[np.floating]) -> ReferenceDistribution:
        """Of logits [..., vocabulary].

        Raises:
            NonFiniteError: NaN or infinite logits.
        """
        flat = _shifted(_flat(logits), "the float model")
        exponentials = np.exp(flat)
        return cls(flat, exponentials, exponentials.sum(axis=1, dtype=np.float64))

    def kl(self, logits: npt.NDArray[np.floating], whose: str) -> float:
        """Sum over positions of KL(reference || logits), nats.

        KL = sum_v p_v (l_v - m_v) - log Z_l + log Z_m, for logits l (reference) and m, in pieces;
        differences in float32, sums in float64.

        Args:
            logits: float [..., vocabulary], as many positions as the reference.
            whose: Names them in an error.

        Raises:
            NonFiniteError: NaN or infinite logits.
        """
        flat = _flat(logits)
        step = max(1, PIECE_ELEMENTS // flat.shape[1])
        total = 0.0
        for start in range(0, len(flat), step):
            piece = slice(start, start + step)
            other = _shifted(flat[piece], whose)
            log_z = np.log(np.exp(other).sum(axis=1, dtype=np.float64))
            np.subtract(self.logits[piece], other, out=other)
            other *= self.exponentials[piece]
            mean = other.sum(axis=1, dtype=np.float64) / self.sums[piece]
            total += float((mean - np.log(self.sums[piece]) + log_z).sum())
        return total


def _flat(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return logits.reshape(-1, logits.shape[-1])


def _shifted(logits: npt.NDArray[np.floating], whose: str) -> Floats:
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():  # max hands a NaN on
        bad = int((~np.isfinite(largest)).sum())
        msg = (
            f"logits of {whose} are not finite at {bad} of {len(largest)} positions; the model "
            "overflows on this text: check it in float32, or calibrate on other text"
        )
        raise NonFiniteError(msg)
    shifted: Floats = np.subtract(logits, largest, dtype=np.float32)
    return shifted
