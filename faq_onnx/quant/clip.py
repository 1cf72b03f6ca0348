"""AWQ's clip search: shrink the range of each block where that lowers its output error.

llm-awq (auto_clip.py) clamps a block to +-m for m = m0, 0.95 m0, ... 0.55 m0 (m0 = max |w|),
rounds, and keeps the ratio with the least squared error of the block's own partial output. On the
diagonal block G_b of the Gram matrix that error is d G_b d^T.

llm-awq clamps the weights and rounds what is left on its min-max grid; here the grid alone says
it: that of the range [max(lo, -m), min(hi, m)], whose codes end at its ends anyway. Symmetric
formats get the same codes either way. In asymmetric ones a clamped weight can stand half-way
between two levels (always where both ends are clamped: lo = -hi has its zero point between two
codes) and rounds to either; the weight itself lies outside and takes the outer, nearer level.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.objective import block_errors
from faq_onnx.quant.stored_scales import ScaleUnit
from faq_onnx.quant.uniform import BlockGrid, block_range, fake_quantize, range_grid

__all__ = ["clip_grid"]

Blocks = npt.NDArray[np.float32]

CLIP_STEPS = 10  # ratios 1.00, 0.95, ... 0.55 as in llm-awq (n_grid 20, max_shrink 0.5)
CLIP_GRID = 20
ROWS_AT_A_TIME = 512  # bounds the temporaries to a few copies of 512 rows


def clip_grid(
    blocks: Blocks, grams: Blocks, fmt: BlockFormat, scale_dtype: npt.DTypeLike = np.float32
) -> BlockGrid:
    """Grid over the best of each block's clipped ranges; ratio 1 (min-max) is among them.

    Args:
        blocks: float32 [N, k_blocks, block].
        grams: Diagonal blocks of the Gram matrix, float32 [k_blocks, block, block].
        fmt: Levels.
        scale_dtype: Dtype in which scales are stored.
    """
    scale = np.empty(blocks.shape[:-1], np.float32)
    zero_point = np.empty_like(scale)
    units = []
    for start in range(0, len(blocks), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        best = _clip_rows(blocks[rows], grams, fmt, scale_dtype)
        scale[rows], zero_point[rows] = best.scale, best.zero_point
        units.append(best.unit)
    return BlockGrid(scale, zero_point, ScaleUnit.join(units))


def _clip_rows(
    blocks: Blocks, grams: Blocks, fmt: BlockFormat, scale_dtype: npt.DTypeLike
) -> BlockGrid:
    low, high = block_range(blocks)
    limit = np.maximum(-low, high)
    best = range_grid(low, high, fmt, scale_dtype)
    best_error = np.full(low.shape, np.inf, np.float32)
    for step in range(CLIP_STEPS):
        end = limit * np.float32(1 - step / CLIP_GRID)
        grid = range_grid(
            np.maximum(low, -end), np.minimum(high, end), fmt, scale_dtype, best.unit
        )
        delta = fake_quantize(blocks, fmt, grid=grid)
        delta -= blocks
        error = block_errors(delta, grams)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best.scale, grid.scale, where=better)
        np.copyto(best.zero_point, grid.zero_point, where=better)
    return best
