"""Move a weight so that it makes up for the errors of the sites before it.

On the low-bit path a site reads x_q instead of x. The weight that brings its output back,
min_V E|x_q V^T - x W^T|^2, is W + W E[(x - x_q)^T x_q] E[x_q^T x_q]^-1. Rounding that instead of
W is the exact form of GPTAQ's term (arXiv 2504.02692), close to QEP and Qronos; algorithms.md 5.2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["shifted_target"]

Matrix = npt.NDArray[np.float32]

RIDGE = 1.0


def shifted_target(
    weight: Matrix, gram: Matrix, cross: Matrix, strength: float, ridge: float = RIDGE
) -> Matrix:
    """W + strength * W C (G + ridge mean(diag G) I)^-1, float32 [N, K].

    Args:
        weight: float32 [N, K].
        gram: G = E[x_q^T x_q], float32 [K, K].
        cross: C = E[(x - x_q)^T x_q], float32 [K, K].
        strength: Share of the error to make up for; 0 leaves the weight.
        ridge: Keeps the correction to directions with much energy: those of little would fit
            the noise of the calibration text.
    """
    damped = gram.astype(np.float64)
    mean = float(np.diagonal(damped).mean()) or 1.0
    np.fill_diagonal(damped, np.diagonal(damped) + ridge * mean)
    correction = np.linalg.solve(damped, cross.T.astype(np.float64)).T
    shifted: Matrix = weight + np.float32(strength) * (weight @ correction.astype(np.float32))
    return shifted
