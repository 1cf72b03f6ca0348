"""Move a weight so that it makes up for the errors of the sites before it.

On the low-bit path a site reads x_q, and its output should be y: what it gives in the float model,
or, where it adds to the residual stream, what brings that stream back to the float one. The
weight that comes closest, min_V E|x_q V^T - y|^2, is W + E[(y - x_q W^T)^T x_q] E[x_q^T x_q]^-1.
Rounding it instead of W is the exact form of GPTAQ's term (arXiv 2504.02692), close to QEP and
Qronos (algorithms.md 5.2, 5.3); the residual stream as the target is ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["shifted_target"]

Matrix = npt.NDArray[np.float32]


def shifted_target(
    weight: Matrix, gram: Matrix, missing: Matrix, strength: float, ridge: float
) -> Matrix:
    """W + strength * M (G + ridge mean(diag G) I)^-1, float32 [N, K].

    Args:
        weight: W, float32 [N, K].
        gram: G = E[x_q^T x_q], float32 [K, K].
        missing: M = E[(y - x_q W^T)^T x_q], float32 [N, K].
        strength: Share of the error to make up for; 0 leaves the weight.
        ridge: Keeps the correction to directions with much energy: in those of little it would
            fit the noise of the calibration text.
    """
    if strength == 0:
        return weight
    damped = gram.astype(np.float64)
    mean = float(np.diagonal(damped).mean()) or 1.0
    np.fill_diagonal(damped, np.diagonal(damped) + ridge * mean)
    correction = np.linalg.solve(damped, missing.T.astype(np.float64)).T
    shifted: Matrix = weight + np.float32(strength) * correction.astype(np.float32)
    return shifted
