"""Move a weight so that it makes up for the errors of the sites before it.

On the low-bit path a site reads x_q, and its output should be y: what it gives in the float model,
or, where it adds to the residual stream, what brings that stream back to the float one. The
weight that comes closest, min_V E|x_q V^T - y|^2, is W + M G^-1 with G = E[x_q^T x_q] and
M = E[(y - x_q W^T)^T x_q]. Rounding it instead of W is the exact form of GPTAQ's term (arXiv
2504.02692), close to QEP and Qronos (algorithms.md 5.2, 5.3); the residual stream as y is ours.

M is mostly noise: the errors that it should find in x_q are small beside the rest. So the
correction is damped, D = a M (G + r mean(diag G) I)^-1, and ridge r and strength a are those under
which what one half of the tokens asks for helps the other half most (2-fold cross-validation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["RIDGES", "Miss", "correction", "damped_correction"]

Matrix = npt.NDArray[np.float32]

RIDGES = (0.1, 1.0)


@dataclasses.dataclass(frozen=True)
class Miss:
    """What a weight misses on some tokens.

    Attributes:
        gram: G = E[x_q^T x_q], float32 [K, K].
        missing: M = E[(y - x_q W^T)^T x_q], float32 [N, K]. For sites whose y is x W^T, the
            activation itself may stand for all of them: E[(x - x_q)^T x_q], [K, K]; their
            weights then take W times its correction.
        tokens: How many the means are over; only ratios matter.
    """

    gram: Matrix
    missing: Matrix
    tokens: int = 1

    @classmethod
    def mean(cls, halves: tuple[Miss, Miss]) -> Miss:
        """Over the tokens of both."""
        one, other = halves
        tokens = one.tokens + other.tokens
        share = np.float32(one.tokens / tokens)
        gram = share * one.gram + (1 - share) * other.gram
        return cls(gram, share * one.missing + (1 - share) * other.missing, tokens)

    def linear_gain(self, change: Matrix) -> float:
        """Half the slope of the loss along `change`, downwards: tr(D M^T)."""
        return float(np.vdot(change, self.missing))

    def curvature(self, change: Matrix) -> float:
        """tr(D G D^T)."""
        return float(np.vdot(change @ self.gram, change))


def correction(halves: tuple[Miss, Miss], ridges: Sequence[float] = RIDGES) -> Matrix:
    """What to add to the weight, float32 [N, K]; zeros where nothing helps.

    E|x_q (W + a D)^T - y|^2 falls by 2 a tr(D M^T) - a^2 tr(D G D^T): with D of one half of the
    tokens and M, G of the other, the best strength a, limited to [0, 1], has a closed form.
    """
    one, other = halves
    best, strength, least = None, 0.0, 0.0
    for ridge in ridges:
        pairs = [(damped_correction(one, ridge), other), (damped_correction(other, ridge), one)]
        slope = sum(half.linear_gain(change) for change, half in pairs)
        curvature = sum(half.curvature(change) for change, half in pairs)
        if slope <= 0 or curvature <= 0:
            continue
        wish = min(slope / curvature, 1.0)
        gain = 2 * wish * slope - wish**2 * curvature
        if gain > least:
            best, strength, least = ridge, wish, gain
    if best is None:
        return np.zeros_like(one.missing)
    return np.float32(strength) * damped_correction(Miss.mean(halves), best)


def damped_correction(miss: Miss, ridge: float) -> Matrix:
    """M (G + ridge mean(diag G) I)^-1, float32 [N, K]."""
    damped = miss.gram.astype(np.float64)
    mean = float(np.diagonal(damped).mean()) or 1.0
    np.fill_diagonal(damped, np.diagonal(damped) + ridge * mean)
    change: Matrix = np.linalg.solve(damped, miss.missing.T.astype(np.float64)).T
    return np.ascontiguousarray(change, dtype=np.float32)
