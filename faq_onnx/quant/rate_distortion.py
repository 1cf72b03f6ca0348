"""How few bits would do: the rate-distortion bound of a weight under its Gram matrix.

Take the weights of a site as independent Gaussian with one variance sigma^2, and a row's
distortion as d G d^T / K. In the eigenbasis of G that is a parallel Gaussian source with
component energies lambda_i = sigma^2 eig_i(G), for which reverse water-filling is optimal
(Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.3):

    D(theta) = mean_i min(theta, lambda_i)
    R(theta) = mean_i max(0, 1/2 log2(lambda_i / theta))      bits per weight

No quantizer of that source reaches D with fewer bits. Real weights are neither Gaussian nor
memoryless, so for them it is a yardstick, not a proof.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["component_energies", "gaussian_rate", "water_level"]

Energies = npt.NDArray[np.float64]


def component_energies(gram: npt.NDArray[np.floating], variance: float) -> Energies:
    """lambda_i = variance * eig_i(G), ascending, float64 [K].

    Args:
        gram: E[x^T x], [K, K], symmetric; eigenvalues that rounding made negative become 0.
        variance: Of the weights.
    """
    eigenvalues = np.linalg.eigvalsh(gram.astype(np.float64))
    energies: Energies = np.maximum(eigenvalues, 0.0) * variance
    return energies


def water_level(energies: Energies, distortion: float) -> float:
    """The theta with mean_i min(theta, lambda_i) = distortion; the largest energy where none is.

    D(theta) is piecewise linear with corners at the energies, so the level is found exactly.

    Raises:
        ValueError: A distortion that is not above 0.
    """
    if not distortion > 0:
        msg = f"distortion {distortion}: a Gaussian source needs endless bits for less than any"
        raise ValueError(msg)
    levels = np.sort(energies)
    count = len(levels)
    drowned = np.concatenate([[0.0], np.cumsum(levels)])[:-1]  # by components below each corner
    above = np.arange(count, 0, -1)
    corners = (drowned + above * levels) / count
    below = int(np.searchsorted(corners, distortion))
    if below == count:
        return float(levels[-1])
    level = (distortion * count - drowned[below]) / above[below]
    return float(level)


def gaussian_rate(energies: Energies, distortion: float) -> float:
    """R(D) in bits per weight: the least rate at which the distortion can be reached.

    Args:
        energies: lambda_i, [K], at least 0.
        distortion: sum_n d_n G d_n^T / (N K), above 0.
    """
    level = water_level(energies, distortion)
    over = energies[energies > level]
    return float(np.log2(over / level).sum() / (2 * len(energies)))
