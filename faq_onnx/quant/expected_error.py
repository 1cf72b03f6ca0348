"""What GPTQ is expected to cost, without rounding: for searches that ask it many times.

The loss of a row is exactly the sum over channels of e_k^2 d_k (`gptq.channel_energies`), and an
error is spread evenly over the step of its block: E e^2 = step^2 / 12. So with channel scales s

    E loss(s) = 1/12 sum_n sum_b step_nb(W diag(s))^2 sum_{k in b} d_k / s_k^2

where the steps are those of min-max grids. What nearest rounding costs is the same sum with the
second moments of the channels for d, where their errors are independent: GPTQ has made up for most
of that, so it wants weaker scales. On SmolLM2 the best exponents of this sum are within 0.1, once
0.2, of those found by rounding with GPTQ; those for nearest rounding are up to 0.4 above them
(docs/methods.md).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.uniform import block_range, range_grid, to_blocks

__all__ = ["expected_gptq_error"]

Array = npt.NDArray[np.float32]

UNIFORM_VARIANCE = 1 / 12  # of an error between -1/2 and 1/2


def expected_gptq_error(
    weight: Array, scale: Array, energies: npt.NDArray[np.floating], fmt: BlockFormat
) -> float:
    """E tr((Q(W s)/s - W) G (Q(W s)/s - W)^T) under GPTQ.

    Args:
        weight: W, float32 [N, K].
        scale: s, float32 [K], > 0.
        energies: d of the activations x that meet W, float64 [K], from `channel_energies`.
        fmt: Levels and block size.
    """
    low, high = block_range(to_blocks(weight * scale, fmt.block_size))
    steps = np.where(high > low, range_grid(low, high, fmt).scale, 0).astype(np.float64)
    padded = np.zeros(low.shape[1] * fmt.block_size)
    padded[: len(scale)] = energies / np.square(scale.astype(np.float64))
    by_block = padded.reshape(-1, fmt.block_size).sum(axis=1)
    return float(np.square(steps).sum(axis=0) @ by_block) * UNIFORM_VARIANCE
