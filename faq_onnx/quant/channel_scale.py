"""Channel scales s in R^K: AWQ's family, and FAQ's fused statistic. No search here.

A site y = x W^T becomes y = (x / s) (W diag(s))^T: the function is unchanged, but the columns of
W that meet large activations are rounded on a finer relative grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from faq_onnx.config import FaqConfig

__all__ = [
    "awq_scale",
    "exponents",
    "fuse_statistics",
    "future_layers",
    "level_scale",
    "share_over_heads",
]

Vector = npt.NDArray[np.float32]

MIN_CHANNEL_SCALE = np.float32(1e-4)  # llm-awq clamps here (auto_scale.py)
# Beta of level_scale. SmolLM2, error after GPTQ relative to no scales, geometric mean of 11 groups
# at 3 bits in blocks of 64, and 4 in 32: beta 0 .945 and .900, .25 .924 and .884, .5 .912 and
# .877, .75 .904 and .870, 1 .904 and .876.
LEVELLING = 0.75
LEAST_WEIGHT = 1e-3  # of the mean column: a column of zeros needs no large scale


def exponents(grid_points: int) -> tuple[float, ...]:
    """Candidate exponents 0, 1/n, ..., (n-1)/n; 0 gives the identity scale."""
    return tuple(point / grid_points for point in range(grid_points))


def awq_scale(statistic: Vector, exponent: float) -> Vector:
    """Scale s = max(a^alpha, 1e-4) / sqrt(max s * min s), as in llm-awq's auto_scale.

    Args:
        statistic: a = mean |x| per input channel, float32 [K], >= 0.
        exponent: alpha in [0, 1]; 0 gives exactly ones.
    """
    return _centred(np.power(statistic, np.float32(exponent)))


def level_scale(statistic: Vector, weight_rms: Vector, exponent: float) -> Vector:
    """Scale s = a^alpha / w^beta, centred as AWQ's: it also levels the columns of the weight.

    A column of large weights sets the step of its whole block, which the others pay for. AutoAWQ
    has the same form with beta = 1 - alpha ("duo scaling"). Beta is a constant: see LEVELLING.

    Args:
        statistic: a, float32 [K], >= 0.
        weight_rms: w, root mean square of the column of each channel, float32 [K], >= 0.
        exponent: alpha in [0, 1].
    """
    floor = np.float32(LEAST_WEIGHT * float(weight_rms.mean()) or 1)
    level = np.power(np.maximum(weight_rms, floor), np.float32(LEVELLING))
    return _centred((np.power(statistic, np.float32(exponent)) / level).astype(np.float32))


def _centred(raw: Vector) -> Vector:
    scale = np.maximum(raw, MIN_CHANNEL_SCALE)
    spread = np.sqrt(scale.max() * scale.min())
    result: Vector = (scale / spread).astype(np.float32)
    return result


def future_layers(layer: int, count: int, config: FaqConfig) -> tuple[int, ...]:
    """Layers whose statistics are previewed from `layer`; truncated at the last layer.

    "layer" looks at the one layer `window` ahead (or the last one), "window" at the next
    `window` layers. The last layer sees none.
    """
    if config.preview == "layer":
        ahead = min(layer + config.window, count - 1)
        return (ahead,) if ahead > layer else ()
    return tuple(range(layer + 1, min(layer + config.window, count - 1) + 1))


def fuse_statistics(current: Vector, future: Sequence[Vector], config: FaqConfig) -> Vector:
    """a~_i = gamma a_i + (1 - gamma) mean_k a_{i+k}; each a divided by its own norm before.

    Reconstructed from the abstract of arXiv:2602.02538 (algorithms.md 1.3; the exact constants are
    not public). gamma = 1, or no future layer, returns `current` itself, which makes FAQ equal to
    AWQ bit for bit. The result is brought back to the size of a_i.

    Args:
        current: mean |x| of this layer, float32 [K].
        future: The same role's statistic in later layers, each float32 [K].
        config: Fusion factor gamma and normalisation.
    """
    if config.fusion == 1.0 or not future:
        return current
    own_size = _size(current, config)
    ahead = np.mean([a / _size(a, config) for a in future], axis=0, dtype=np.float64)
    gamma = config.fusion
    fused = gamma * (current / own_size) + (1.0 - gamma) * ahead
    result: Vector = (fused * own_size).astype(np.float32)
    return result


def share_over_heads(statistic: Vector, head_dim: int, repeats: int) -> Vector:
    """One value for the `repeats` query heads that read one value head: their mean.

    Args:
        statistic: float32 [kv_heads * repeats * head_dim], heads of one group side by side.
        head_dim: Channels of a head.
        repeats: Query heads per key/value head.
    """
    heads = statistic.reshape(-1, repeats, head_dim)
    shared = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape)
    result: Vector = np.ascontiguousarray(shared).reshape(-1)
    return result


def _size(statistic: Vector, config: FaqConfig) -> float:
    if config.normalisation == "none":
        return 1.0
    size = statistic.mean() if config.normalisation == "mean" else statistic.max()
    return float(size) or 1.0
