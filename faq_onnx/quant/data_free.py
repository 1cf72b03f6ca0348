"""Grids that look at weights alone: HQQ and k-quants.

Both find a zero point of any value, which MatMulNBits cannot store: it is rounded. HQQ is a
baseline and kept as it is; where the rounded zero point is worse than that of the min-max grid,
so it stays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.errors import UnsupportedFormatError
from faq_onnx.quant.stored_scales import ScaleUnit, storable_scale
from faq_onnx.quant.uniform import BlockGrid, minmax_grid

__all__ = ["hqq_grid", "k_quant_grid"]

Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 15  # 128 KB: the temporaries of a chunk stay in the second-level cache

SMALLEST = np.finfo(np.float32).tiny

HQQ_POWER = 0.7  # p of |w - w^|^p; this and the next three are hqq's defaults
HQQ_BETA = 10.0
HQQ_KAPPA = 1.01
HQQ_ITERATIONS = 20

# Levels across the range of a block that are tried, from the number there is: llama.cpp's
# make_qkx3_quants and make_qx_quants.
K_QUANT_STEPS = np.linspace(-0.9, 0.9, 37, dtype=np.float32)
K_QUANT_SYMMETRIC_STEPS = np.linspace(-0.9, 0.9, 19, dtype=np.float32)


def hqq_grid(
    blocks: Floats, fmt: BlockFormat, scale_dtype: npt.DTypeLike = np.float32
) -> BlockGrid:
    """Half-quadratic quantization: the min-max scale, and a zero point for sparse errors.

    Minimises sum |w - w^|^p over the zero point z (Badri and Shaji 2023; algorithms.md 5.4):
    codes c = clip(round(w / s + z)), errors e = shrink(w - s (c - z)), z = mean(c - (w - e) / s),
    where shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0). Unlike in hqq, which looks at the
    whole weight, each block stops when its own mean |w - w^| no longer falls.

    Args:
        blocks: float32 [N, k_blocks, block].
        fmt: An asymmetric format.
        scale_dtype: Dtype in which scales are stored.

    Raises:
        UnsupportedFormatError: For a symmetric format, which has no zero point to move.
    """
    if fmt.symmetric:
        msg = "grid hqq moves the zero point and a symmetric format has none; choose asymmetric"
        raise UnsupportedFormatError(msg)
    grid = minmax_grid(blocks, fmt, scale_dtype)
    highest = np.float32((1 << fmt.code_bits) - 1)
    zero_point = np.empty_like(grid.zero_point)
    for rows, block, columns in _chunks(blocks):
        zero = _hqq_zero(columns, grid.scale[rows, block], highest)
        zero_point[rows, block] = np.clip(np.rint(zero), np.float32(0), highest)
    return BlockGrid(grid.scale, zero_point, grid.unit)


def k_quant_grid(
    blocks: Floats, fmt: BlockFormat, scale_dtype: npt.DTypeLike = np.float32
) -> BlockGrid:
    """llama.cpp's k-quants on one level: weighted least squares over several roundings.

    Each number of levels across the block's range gives codes l; the codes give scale and minimum
    in closed form; the pair of least weighted squared error wins (algorithms.md 5.9, after
    make_qkx3_quants; symmetric: make_qx_quants, which has no minimum). Here the minimum is
    -scale * zero point: each is rounded to that, and its scale fitted again, before it is judged.
    onnxruntime's k_quant rounds only the winner, which at 4 bits costs more than the fit gains.
    A squared error weighs sqrt(mean(w^2)) + |w|, and by these weights no block is worse than on
    its min-max grid. Padding of a ragged end counts as weights of 0.

    Args:
        blocks: float32 [N, k_blocks, block].
        fmt: Levels.
        scale_dtype: Dtype in which scales are stored.
    """
    scale = np.empty(blocks.shape[:-1], np.float32)
    zero_point = np.full(scale.shape, 1 << (fmt.storage_bits - 1), np.float32)
    highest = np.float32((1 << fmt.code_bits) - 1)
    for rows, block, columns in _chunks(blocks):
        weights = np.sqrt(np.mean(np.square(columns), axis=0)) + np.abs(columns)
        if fmt.symmetric:
            fitted = _fit_scale(columns, weights, (highest + 1) / 2)
            scale[rows, block] = fitted
            continue
        fitted, zero_point[rows, block] = _fit_scale_and_zero(columns, weights, highest)
        scale[rows, block] = fitted
    unit = ScaleUnit.of(scale, fmt, scale_dtype)
    return BlockGrid(storable_scale(scale, scale_dtype, unit), zero_point, unit)


def _chunks(blocks: Floats) -> Iterator[tuple[slice, int, Floats]]:
    """Some rows of one block column, as [block, rows]."""
    step = max(1, CHUNK_ELEMENTS // blocks.shape[-1])
    for block in range(blocks.shape[1]):
        for start in range(0, len(blocks), step):
            rows = slice(start, start + step)
            yield rows, block, np.ascontiguousarray(blocks[rows, block].T)


def _hqq_zero(columns: Floats, scale: Floats, highest: np.float32) -> Floats:
    """Zero points of any value, float32 [rows]."""
    levels: Floats = columns / scale
    zero: Floats = -np.minimum.reduce(levels, axis=0, initial=0.0)
    best = np.full(scale.shape, np.inf, np.float32)
    active = np.ones(scale.shape, np.bool_)
    beta = HQQ_BETA
    for _ in range(HQQ_ITERATIONS):
        codes = np.clip(np.rint(levels + zero), np.float32(0), highest)
        error = (levels - (codes - zero)) * scale
        size = np.abs(error)
        threshold = np.maximum(size, SMALLEST) ** np.float32(HQQ_POWER - 1) / np.float32(beta)
        kept = np.copysign(np.maximum(size - threshold, np.float32(0)), error)
        moved = np.mean(codes - (levels - kept / scale), axis=0)
        np.copyto(zero, moved, where=active)
        mean_size = np.mean(size, axis=0)
        active &= mean_size < best
        best = np.minimum(best, mean_size)
        if not active.any():
            break
        beta *= HQQ_KAPPA
    return zero


def _fit_scale_and_zero(
    columns: Floats, weights: Floats, highest: np.float32
) -> tuple[Floats, Floats]:
    """Positive scale and zero point of w ~ scale * (code - zero): float32 [rows] each."""
    low, high = _ends(columns)
    span = high - low
    offset = (columns - low) / np.where(span > 0, span, np.float32(1))
    weighted = weights * columns
    sum_w, sum_x = weights.sum(axis=0), weighted.sum(axis=0)
    best_scale = np.where(span > 0, span / highest, np.float32(1))
    best_zero = np.rint(-low / best_scale)
    codes = np.rint(columns / best_scale)
    codes = np.clip(codes, -best_zero, highest - best_zero)
    best_error = _weighted_error(codes, best_scale, columns, weights)
    for step in K_QUANT_STEPS:
        codes = np.clip(np.rint(offset * (highest + step)), np.float32(0), highest)
        weighted_codes = weights * codes
        sum_l, sum_ll = weighted_codes.sum(axis=0), (weighted_codes * codes).sum(axis=0)
        sum_xl = (weighted * codes).sum(axis=0)
        # minimum / scale of the least squares fit, as an integer: -zero
        zero = -_quotient(sum_ll * sum_x - sum_l * sum_xl, sum_w * sum_xl - sum_x * sum_l)
        zero = np.clip(np.rint(zero), np.float32(0), highest)
        codes -= zero
        scale = _quotient(sum_xl - zero * sum_x, (weights * codes * codes).sum(axis=0))
        error = _weighted_error(codes, scale, columns, weights)
        better = (error < best_error) & (scale > 0)
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_zero, zero, where=better)
    return best_scale, best_zero


def _fit_scale(columns: Floats, weights: Floats, half: np.float32) -> Floats:
    """Signed scale of w ~ scale * code, codes -half ... half - 1: float32 [rows]."""
    low, high = _ends(columns)
    extreme = np.where(high > -low, high, low)
    offset = columns / np.where(extreme != 0, -extreme, np.float32(1))
    weighted = weights * columns
    best_scale, best_gain = np.zeros_like(low), np.zeros_like(low)
    for step in K_QUANT_SYMMETRIC_STEPS:
        codes = np.clip(np.rint(offset * (half + step)), -half, half - 1)
        sum_xl = (weighted * codes).sum(axis=0)
        scale = _quotient(sum_xl, (weights * codes * codes).sum(axis=0))
        gain = scale * sum_xl  # what the weighted sum of w^2 falls by
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, scale, where=better)
    return best_scale


def _weighted_error(codes: Floats, scale: Floats, columns: Floats, weights: Floats) -> Floats:
    delta = codes * scale
    delta -= columns
    delta *= delta
    delta *= weights
    error: Floats = delta.sum(axis=0)
    return error


def _ends(columns: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value, 0 included: float32 [rows] each."""
    low: Floats = np.minimum.reduce(columns, axis=0, initial=0.0)
    high: Floats = np.maximum.reduce(columns, axis=0, initial=0.0)
    return low, high


def _quotient(above: Floats, below: Floats) -> Floats:
    """Quotient above / below, 0 where `below` is not positive."""
    result: Floats = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return result
