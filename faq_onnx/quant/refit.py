"""Improve a rounding in place: other scales for its codes, or other codes for its scales.

Both are block-coordinate descents on sum_n d_n G d_n^T with d = w^ - w. The scale step is the
exact minimiser of one block's scale with all codes frozen (algorithms.md 3.2, Feature 3,
grouped); the code step is the exact minimiser of one code with the rest of its row frozen. So
neither raises a row's loss, and they can alternate.

An input channel is a contiguous row of N in here, as in gptq.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.quant.gptq import keep_better_rows, weight_error
from faq_onnx.quant.stored_scales import storable_scale
from faq_onnx.quant.uniform import HALF, BlockGrid, code_limits

__all__ = ["descend_codes", "refit_scales"]

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

LAZY_CHANNELS = 32  # steps of a lazy block of channels stay in the second-level cache
FLAT = 1e-12  # a channel with less than this of the largest moment has no measurable effect
ROWS_AT_A_TIME = 4096  # bounds the temporaries to a few [K, 4096] matrices


def refit_scales(
    weight: Matrix,
    codes: Codes,
    grid: BlockGrid,
    gram: Matrix,
    scale_dtype: npt.DTypeLike = np.float32,
) -> BlockGrid:
    """The best scale of one block after another, codes and zero points frozen.

    With I = code - zero point and G_g the rows of G that belong to block g:
        s_g += I_g . (G_g (w - w^)) / (I_g G_gg I_g^T).
    A step t changes the loss by t^2 (I G_gg I^T) - 2 t (I . G_g (w - w^)). It is taken only where
    that is negative for the scale as it will be stored; no scale becomes 0 or changes sign.

    Args:
        weight: Target, float32 [N, K]; K may be ragged.
        codes: uint8 [N, k_blocks, block].
        grid: Levels that `codes` were rounded to, float32 [N, k_blocks].
        gram: float32 [K, K], mean over tokens of x^T x.
        scale_dtype: Dtype in which scales are stored.

    Returns:
        Grid with new scales, as they can be stored, and the same zero points.
    """
    scale = np.empty_like(grid.scale)
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        part = grid.rows(rows)
        scale[rows] = _refit_rows(weight[rows], codes[rows], part, gram, scale_dtype)
    return BlockGrid(scale, grid.zero_point, grid.unit)


def descend_codes(
    weight: Matrix, codes: Codes, grid: BlockGrid, gram: Matrix, fmt: BlockFormat
) -> Codes:
    """One sweep over the channels: the best code of each, given the rest of its row.

    The best value of w^_k is w^_k - (G d)_k / G_kk, and the loss grows with the distance to it:
    its nearest level is the exact minimiser.

    Args:
        weight: Target, float32 [N, K]; K may be ragged.
        codes: uint8 [N, k_blocks, block], where to start.
        grid: Levels, float32 [N, k_blocks].
        gram: float32 [K, K], mean over tokens of x^T x.
        fmt: Levels' limits and the block size.

    Returns:
        uint8 [N, k_blocks, block]; a row whose loss did not fall keeps its codes.
    """
    result = np.empty_like(codes)
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        part = grid.rows(rows)
        lower = _descend_rows(weight[rows], codes[rows], part, gram, fmt)
        result[rows] = keep_better_rows(weight[rows], codes[rows], lower, part, gram)
    return result


def _refit_rows(
    weight: Matrix, codes: Codes, grid: BlockGrid, gram: Matrix, scale_dtype: npt.DTypeLike
) -> Matrix:
    """New scales [n, k_blocks] of some rows [n, K]."""
    columns, size = weight.shape[1], codes.shape[-1]
    errors = weight_error(weight, codes, grid).T.copy()
    store = functools.partial(storable_scale, scale_dtype=scale_dtype, unit=grid.unit)
    scale = grid.scale.T.copy()  # ascontiguousarray would hand back one block's own memory
    for block in range(len(scale)):
        channels = slice(block * size, min((block + 1) * size, columns))
        levels = codes[:, block, : channels.stop - channels.start].T.astype(np.float32)
        levels -= grid.zero_point[:, block]
        gradient = gram[channels] @ errors
        gradient *= levels
        pull = -gradient.sum(axis=0)
        curvature = gram[channels, channels] @ levels
        curvature *= levels
        step = _storable_step(scale[block], pull, curvature.sum(axis=0), store)
        scale[block] = store(scale[block] + step)  # a sum may miss it by a rounding
        levels *= step
        errors[channels] += levels
    return np.ascontiguousarray(scale.T)


def _storable_step(
    scale: Matrix, pull: Matrix, curvature: Matrix, store: Callable[[Matrix], Matrix]
) -> Matrix:
    """From a scale to the best one that can be stored, or 0: float32 [n].

    Args:
        scale: Now, as stored.
        pull: Half the loss's slope, negated.
        curvature: Half the loss's second derivative, >= 0.
        store: Rounds scales to what can be stored.
    """
    bent = curvature > 0
    wished = scale + np.divide(pull, curvature, out=np.zeros_like(pull), where=bent)
    stored = store(wished)
    step: Matrix = stored - scale
    usable = np.signbit(stored) == np.signbit(scale)
    usable &= step * step * curvature < 2 * step * pull
    return np.where(bent & usable, step, np.float32(0))


def _descend_rows(
    weight: Matrix, codes: Codes, grid: BlockGrid, gram: Matrix, fmt: BlockFormat
) -> Codes:
    """One sweep over some rows [n, K]."""
    rows, columns = weight.shape
    errors = weight_error(weight, codes, grid).T.copy()
    result = codes.reshape(rows, -1).T.copy()  # a single row's transpose is its own memory
    scale = np.ascontiguousarray(grid.scale.T)
    lowest, highest = (np.float32(limit) for limit in code_limits(fmt))
    curvature = np.diagonal(gram)
    flat = curvature <= FLAT * curvature.max(initial=0.0)
    steps = np.empty((LAZY_CHANNELS, rows), np.float32)
    code, taken = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for start in range(0, columns, LAZY_CHANNELS):
        stop = min(start + LAZY_CHANNELS, columns)
        gradients = gram[start:stop] @ errors
        for k in range(start, stop):
            gradient, step, block = gradients[k - start], steps[k - start], k // fmt.block_size
            if flat[k]:
                step.fill(0)
                continue
            if k > start:
                np.dot(gram[k, start:k], steps[: k - start], out=taken)
                np.add(gradient, taken, out=gradient)
            np.divide(gradient, scale[block], out=gradient)
            np.divide(gradient, curvature[k], out=gradient)
            np.subtract(result[k], gradient, out=code)
            np.add(code, HALF, out=code)
            np.floor(code, out=code)
            np.maximum(code, lowest, out=code)  # np.clip takes twice as long
            np.minimum(code, highest, out=code)
            np.subtract(code, result[k], out=step)
            np.multiply(step, scale[block], out=step)
            np.add(errors[k], step, out=errors[k])
            result[k] = code
    return np.ascontiguousarray(result.T.reshape(codes.shape))
