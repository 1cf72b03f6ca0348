"""Uniform block grids and round-to-nearest: w = scale * (code - zero_point), blocks along K.

Equal to the DEFAULT algorithm of onnxruntime's MatMulNBitsQuantizer, bit for bit:
    asymmetric  lo = min(w, 0), hi = max(w, 0), scale = (hi - lo) / (2^b - 1),
                zp = round(-lo / scale)
    symmetric   scale = (value of largest magnitude, signed) / -2^(b-1), zp = 2^(storage_bits-1)
    code = clip(round(w * (1 / scale) + zp)), halves away from zero, scale as stored (float16!).

Every elementwise step runs on chunks transposed to [block, rows]: there a block's scale is a
plain vector operand, which in numpy is three times as fast as broadcasting over a short axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.quant.packing import pack_codes, unpack_codes
from faq_onnx.quant.stored_scales import ScaleUnit, storable_scale

__all__ = [
    "BlockGrid",
    "block_range",
    "dequantize",
    "dequantize_weight",
    "fake_quantize",
    "minmax_grid",
    "quantize_rtn",
    "range_grid",
    "round_to_grid",
    "to_blocks",
    "to_quantized_weight",
    "unpack_weight",
]

Floats = npt.NDArray[np.float32]

# floor(x + HALF) rounds halves up and, unlike adding 0.5, leaves the number just below 0.5 at 0.
HALF = np.nextafter(np.float32(0.5), np.float32(0.0))
CHUNK_ELEMENTS = 1 << 17  # 512 KB of float32: a chunk stays in the second-level cache


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """The levels of every block.

    Attributes:
        scale: float32 [N, k_blocks], as it can be stored, never 0.
        zero_point: float32 [N, k_blocks], integer-valued.
        unit: What scales are multiples of; None where each is stored as a float.
    """

    scale: Floats
    zero_point: Floats
    unit: ScaleUnit | None = None

    def rows(self, rows: slice) -> BlockGrid:
        """Some rows of it."""
        unit = None if self.unit is None else self.unit.rows(rows)
        return BlockGrid(self.scale[rows], self.zero_point[rows], unit)


def to_blocks(weight: npt.NDArray[np.floating], block_size: int) -> Floats:
    """Cut [N, K] into float32 [N, ceil(K / block_size), block_size]; the last is zero-padded.

    A contiguous float32 weight with whole blocks is not copied.
    """
    rows, columns = weight.shape
    k_blocks = -(-columns // block_size)
    if columns == k_blocks * block_size:
        whole = np.ascontiguousarray(weight, dtype=np.float32)
        return whole.reshape(rows, k_blocks, block_size)
    padded = np.zeros((rows, k_blocks * block_size), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, k_blocks, block_size)


def code_limits(fmt: BlockFormat) -> tuple[int, int]:
    """Lowest and highest code of a format; 3-bit codes centre on the 4-bit zero point."""
    if not fmt.symmetric:
        return 0, (1 << fmt.code_bits) - 1
    middle, half = 1 << (fmt.storage_bits - 1), 1 << (fmt.code_bits - 1)
    return middle - half, middle + half - 1


def block_range(blocks: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value of each block, 0 included: float32 [N, k_blocks] each."""
    low = np.empty(blocks.shape[:-1], np.float32)
    high = np.empty(blocks.shape[:-1], np.float32)
    flat_low, flat_high = low.reshape(-1), high.reshape(-1)
    for rows, columns in _chunks(blocks):
        np.minimum.reduce(columns, axis=0, initial=0.0, out=flat_low[rows])
        np.maximum.reduce(columns, axis=0, initial=0.0, out=flat_high[rows])
    return low, high


def range_grid(
    low: Floats,
    high: Floats,
    fmt: BlockFormat,
    scale_dtype: npt.DTypeLike = np.float32,
    unit: ScaleUnit | None = None,
) -> BlockGrid:
    """Grid that covers [low, high] of each block (low <= 0 <= high, float32 [N, k_blocks]).

    Scales are rounded to `scale_dtype`; one that would become 0 or overflow there is set to the
    nearest usable value, an all-zero block gets 1. Or to multiples of a unit, by default the one
    that suits these ranges.
    """
    if fmt.symmetric:
        half = np.float32(1 << (fmt.code_bits - 1))
        wished: Floats = np.divide(np.where(high > -low, high, low), -half)
        if fmt.block_scales == "lpbq":  # which has no negative ones to put the long side first
            wished = np.maximum(-low / half, high / (half - 1))
        unit = unit or ScaleUnit.of(wished, fmt, scale_dtype)
        scale = storable_scale(wished, scale_dtype, unit)
        middle = np.float32(1 << (fmt.storage_bits - 1))
        return BlockGrid(scale, np.full(scale.shape, middle, np.float32), unit)
    levels = np.float32((1 << fmt.code_bits) - 1)
    span: Floats = np.divide(high - low, levels)
    unit = unit or ScaleUnit.of(span, fmt, scale_dtype)
    scale = storable_scale(span, scale_dtype, unit)
    # onnxruntime takes the zero point from the scale before it is rounded to float16
    divisor = np.where(span > 0, span, np.float32(1))
    zero_point = np.floor(np.float32(0) - low / divisor + HALF)
    return BlockGrid(scale, np.clip(zero_point, np.float32(0), levels), unit)


def minmax_grid(
    blocks: Floats, fmt: BlockFormat, scale_dtype: npt.DTypeLike = np.float32
) -> BlockGrid:
    """Grid over the full range of float32 blocks [N, k_blocks, block]."""
    low, high = block_range(blocks)
    return range_grid(low, high, fmt, scale_dtype)


def round_to_grid(blocks: Floats, grid: BlockGrid, fmt: BlockFormat) -> npt.NDArray[np.uint8]:
    """Nearest code of every weight: uint8 [N, k_blocks, block]."""
    codes = np.empty(blocks.shape, np.uint8)
    flat = codes.reshape(-1, blocks.shape[-1])
    scale, zero_point = grid.scale.reshape(-1), grid.zero_point.reshape(-1)
    for rows, columns in _chunks(blocks):
        _round(columns, scale[rows], zero_point[rows], fmt)
        flat[rows] = columns.T
    return codes


def dequantize(codes: npt.NDArray[np.uint8], grid: BlockGrid) -> Floats:
    """Weights that codes stand for: float32 [N, k_blocks, block]."""
    weights = codes.astype(np.float32)
    weights -= grid.zero_point[..., np.newaxis]
    weights *= grid.scale[..., np.newaxis]
    return weights


def fake_quantize(
    blocks: Floats,
    fmt: BlockFormat,
    out: Floats | None = None,
    *,
    scale_dtype: npt.DTypeLike = np.float32,
    grid: BlockGrid | None = None,
) -> Floats:
    """Round and dequantize in one go, for search loops; no codes are kept.

    Args:
        blocks: float32 [N, k_blocks, block], contiguous.
        fmt: Levels.
        out: Receives the result (contiguous, may be `blocks` itself); allocated if None.
        scale_dtype: Dtype in which scales will be stored.
        grid: Levels to round to; by default each block's own min-max grid.

    Returns:
        float32 [N, k_blocks, block], equal to dequantize(round_to_grid(...)).
    """
    if grid is None and fmt.block_scales != "float":  # chunks know nothing of whole rows
        grid = minmax_grid(blocks, fmt, scale_dtype)
    result = np.empty_like(blocks) if out is None else out
    flat = result.reshape(-1, blocks.shape[-1])
    for rows, columns in _chunks(blocks):
        if grid is None:
            low = np.minimum.reduce(columns, axis=0, initial=0.0)
            high = np.maximum.reduce(columns, axis=0, initial=0.0)
            own = range_grid(low, high, fmt, scale_dtype)
            scale, zero_point = own.scale, own.zero_point
        else:
            scale, zero_point = grid.scale.reshape(-1)[rows], grid.zero_point.reshape(-1)[rows]
        _round(columns, scale, zero_point, fmt)
        np.subtract(columns, zero_point, out=columns)
        np.multiply(columns, scale, out=flat[rows].T)
    return result


def quantize_rtn(
    weight: npt.NDArray[np.floating], fmt: BlockFormat, scale_dtype: npt.DTypeLike = np.float32
) -> QuantizedWeight:
    """Round-to-nearest of a weight [N, K] on its min-max grids."""
    blocks = to_blocks(weight, fmt.block_size)
    grid = minmax_grid(blocks, fmt, scale_dtype)
    codes = round_to_grid(blocks, grid, fmt)
    return to_quantized_weight(codes, grid, fmt, weight.shape[1], scale_dtype)


def to_quantized_weight(
    codes: npt.NDArray[np.uint8],
    grid: BlockGrid,
    fmt: BlockFormat,
    in_features: int,
    scale_dtype: npt.DTypeLike = np.float32,
) -> QuantizedWeight:
    """Pack codes [N, k_blocks, block] and their grid into the layout of MatMulNBits."""
    if fmt.block_scales == "lpbq":
        codes, grid = _anchored(codes, grid, fmt)
    unit, zero_points = grid.unit, None
    if not fmt.symmetric:
        zero_points = pack_codes(grid.zero_point.astype(np.uint8), fmt.storage_bits)
    return QuantizedWeight(
        out_features=codes.shape[0],
        in_features=in_features,
        format=fmt,
        packed=pack_codes(codes, fmt.storage_bits),
        scales=grid.scale.astype(scale_dtype) if unit is None else unit.multiples(grid.scale),
        zero_points=zero_points,
        scale_unit=None if unit is None else unit.values,
    )


def _anchored(
    codes: npt.NDArray[np.uint8], grid: BlockGrid, fmt: BlockFormat
) -> tuple[npt.NDArray[np.uint8], BlockGrid]:
    """Codes and scales of lpbq such that the unit of a row is a sixteenth of its largest scale.

    Qualcomm's converter takes that for the unit, and rounds scales to multiples of it. Searches
    and refits leave rows whose largest multiple is 13, say: what the NPU would make of them is
    made here, where codes can follow.
    """
    assert grid.unit is not None
    unit = ScaleUnit.of(grid.scale, fmt, grid.unit.values.dtype)
    scale = storable_scale(grid.scale, grid.unit.values.dtype, unit)
    rows = (scale != grid.scale).any(axis=1)
    if rows.any():
        middle = np.float32(1 << (fmt.storage_bits - 1))
        levels = codes[rows].astype(np.float32) - middle
        levels *= (grid.scale[rows] / scale[rows])[..., np.newaxis]
        codes = codes.copy()
        codes[rows] = np.clip(np.rint(levels) + middle, *code_limits(fmt)).astype(np.uint8)
    return codes, BlockGrid(scale, grid.zero_point, unit)


def unpack_weight(weight: QuantizedWeight) -> tuple[npt.NDArray[np.uint8], BlockGrid]:
    """Codes uint8 [N, k_blocks, block] and grid of a packed weight."""
    fmt = weight.format
    codes = unpack_codes(weight.packed, fmt.storage_bits, fmt.block_size)
    unit = None if weight.scale_unit is None else ScaleUnit.stored(weight.scale_unit, fmt)
    scale = weight.scales.astype(np.float32) if unit is None else unit.scales(weight.scales)
    if weight.zero_points is None:
        middle = np.float32(1 << (fmt.storage_bits - 1))
        return codes, BlockGrid(scale, np.full(scale.shape, middle, np.float32), unit)
    zero_point = unpack_codes(weight.zero_points, fmt.storage_bits, scale.shape[1])
    return codes, BlockGrid(scale, zero_point.astype(np.float32), unit)


def dequantize_weight(weight: QuantizedWeight) -> Floats:
    """The float32 [N, K] that a packed weight stands for."""
    codes, grid = unpack_weight(weight)
    whole = dequantize(codes, grid).reshape(weight.out_features, -1)
    return np.ascontiguousarray(whole[:, : weight.in_features])


def _chunks(blocks: Floats) -> Iterator[tuple[slice, Floats]]:
    """Chunks of blocks as fresh-to-use [block, rows] buffers, with their rows in flat order.

    One buffer is reused: a chunk is valid until the next one is asked for.
    """
    block_size = blocks.shape[-1]
    flat = blocks.reshape(-1, block_size)
    step = max(1, CHUNK_ELEMENTS // block_size)
    buffer = np.empty((block_size, min(step, len(flat))), np.float32)
    for start in range(0, len(flat), step):
        rows = slice(start, min(start + step, len(flat)))
        columns = buffer[:, : rows.stop - start]
        np.copyto(columns, flat[rows].T)
        yield rows, columns


def _round(columns: Floats, scale: Floats, zero_point: Floats, fmt: BlockFormat) -> None:
    """Turn weights [block, rows] into integer-valued codes, in place."""
    lowest, highest = code_limits(fmt)
    np.multiply(columns, np.float32(1) / scale, out=columns)
    np.add(columns, zero_point, out=columns)
    np.add(columns, HALF, out=columns)
    np.floor(columns, out=columns)
    np.clip(columns, np.float32(lowest), np.float32(highest), out=columns)
