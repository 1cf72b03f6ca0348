"""Uniform grids and round-to-nearest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import (
    BlockGrid,
    block_range,
    dequantize,
    dequantize_weight,
    fake_quantize,
    minmax_grid,
    quantize_rtn,
    range_grid,
    round_to_grid,
    to_blocks,
    to_quantized_weight,
    unpack_weight,
)


def _weight(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)


def test_whole_blocks_are_a_view() -> None:
    weight = _weight(3, 64)
    blocks = to_blocks(weight, 32)
    assert blocks.shape == (3, 2, 32)
    assert np.shares_memory(blocks, weight)


def test_the_last_block_is_padded_with_zeros() -> None:
    weight = _weight(2, 40)
    blocks = to_blocks(weight, 32)
    assert blocks.shape == (2, 2, 32)
    assert np.array_equal(blocks.reshape(2, 64)[:, :40], weight)
    assert not blocks.reshape(2, 64)[:, 40:].any()


def test_ranges_include_zero() -> None:
    blocks = np.array([[[1.0, 2.0], [-3.0, -4.0], [-1.0, 5.0]]], np.float32)
    low, high = block_range(blocks)
    assert low.tolist() == [[0, -4, -1]]
    assert high.tolist() == [[2, 0, 5]]


def test_an_asymmetric_grid_by_hand() -> None:
    fmt = block_format(2, 16, symmetric=False)
    grid = range_grid(np.array([[-1]], np.float32), np.array([[2]], np.float32), fmt)
    assert grid.scale.tolist() == [[1]]
    assert grid.zero_point.tolist() == [[1]]
    blocks = np.array([[[-1, -0.5, 0, 0.49, 0.5, 1.4, 2, 9]]], np.float32)
    # halves away from zero in code space: -0.5 + 1 = 0.5 becomes 1
    assert round_to_grid(blocks, grid, fmt).tolist() == [[[0, 1, 1, 1, 2, 2, 3, 3]]]


def test_a_symmetric_grid_spends_the_extra_level_on_the_larger_side() -> None:
    fmt = block_format(4, 16, symmetric=True)
    blocks = np.zeros((1, 2, 16), np.float32)
    blocks[0, 0, :2] = [8, -3]
    blocks[0, 1, :2] = [-8, 3]
    grid = minmax_grid(blocks, fmt)
    assert grid.scale.tolist() == [[-1, 1]]
    assert round_to_grid(blocks, grid, fmt)[0, :, :2].tolist() == [[0, 11], [0, 11]]


def test_the_number_just_below_one_half_rounds_down() -> None:
    fmt = block_format(4, 16, symmetric=False)
    grid = BlockGrid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    below = np.nextafter(np.float32(0.5), np.float32(0))
    blocks = np.full((1, 1, 16), below, np.float32)
    assert not round_to_grid(blocks, grid, fmt).any()


@pytest.mark.parametrize(("symmetric", "lowest", "highest"), [(False, 0, 7), (True, 4, 11)])
def test_three_bit_codes_use_eight_levels_of_four_bits(
    symmetric: bool, lowest: int, highest: int
) -> None:
    fmt = block_format(3, 32, symmetric=symmetric)
    quantized = quantize_rtn(_weight(64, 128), fmt)
    codes, grid = unpack_weight(quantized)
    assert (codes.min(), codes.max()) == (lowest, highest)
    assert lowest <= grid.zero_point.min() <= grid.zero_point.max() <= max(highest, 8)
    assert quantized.packed.shape == (64, 4, 16)
    error = np.abs(dequantize_weight(quantized) - _weight(64, 128)).reshape(64, 4, 32)
    # one level of the wide side may be cut off in the symmetric grid
    steps = error / np.abs(grid.scale)[..., np.newaxis]
    assert steps.max() < (1.001 if symmetric else 0.501 + 0.5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_blocks_keep_a_usable_scale(symmetric: bool) -> None:
    fmt = block_format(4, 16, symmetric=symmetric)
    quantized = quantize_rtn(np.zeros((2, 32), np.float32), fmt, np.float16)
    assert (quantized.scales == 1).all()
    assert not dequantize_weight(quantized).any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1e-3, 1e3, 3e5, 1e7])
def test_float16_scales_neither_vanish_nor_overflow(magnitude: float, symmetric: bool) -> None:
    fmt = block_format(4, 16, symmetric=symmetric)
    weight = _weight(4, 64) * np.float32(magnitude / 0.05)
    quantized = quantize_rtn(weight, fmt, np.float16)
    assert quantized.scales.dtype == np.float16
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales != 0).all()
    assert np.isfinite(dequantize_weight(quantized)).all()


def test_subnormal_float32_weights_stay_finite() -> None:
    fmt = block_format(4, 16, symmetric=False)
    weight = np.full((1, 16), 1e-44, np.float32)
    assert np.isfinite(dequantize_weight(quantize_rtn(weight, fmt))).all()


def test_codes_fit_the_rounded_scale() -> None:
    """The scale is rounded to float16 first, so errors stay within half of the stored step."""
    fmt = block_format(8, 32, symmetric=False)
    weight = _weight(32, 64).astype(np.float16)
    quantized = quantize_rtn(weight, fmt, np.float16)
    error = np.abs(dequantize_weight(quantized) - weight.astype(np.float32)).reshape(32, 2, 32)
    codes, grid = unpack_weight(quantized)
    inside = (codes > 0) & (codes < 255)
    assert inside.mean() > 0.9
    step = np.broadcast_to(grid.scale[..., np.newaxis], error.shape)
    # code = w / scale + zp in float32: off by at most 2 ulp of 255 before rounding
    assert (error / step)[inside].max() <= 0.5 + 2 * 255 * 2.0**-23


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_fake_quantize_equals_the_two_steps(
    bits: int, symmetric: bool, scale_dtype: type[np.floating]
) -> None:
    fmt = block_format(bits, 32, symmetric=symmetric)
    blocks = to_blocks(_weight(50, 200), 32)
    grid = minmax_grid(blocks, fmt, scale_dtype)
    expected = dequantize(round_to_grid(blocks, grid, fmt), grid)
    assert np.array_equal(fake_quantize(blocks, fmt, scale_dtype=scale_dtype), expected)
    assert np.array_equal(fake_quantize(blocks, fmt, grid=grid), expected)


def test_fake_quantize_may_overwrite_its_input() -> None:
    fmt = block_format(4, 32, symmetric=False)
    blocks = to_blocks(_weight(50, 96), 32)
    expected = fake_quantize(blocks, fmt)
    result = fake_quantize(blocks, fmt, out=blocks)
    assert result is blocks
    assert np.array_equal(blocks, expected)


def test_chunks_cover_everything() -> None:
    fmt = block_format(4, 16, symmetric=False)
    weight = _weight(300, 1000)  # more than two chunks, the last one ragged
    blocks = to_blocks(weight, 16)
    whole = fake_quantize(blocks, fmt)
    alone = np.concatenate([fake_quantize(blocks[row : row + 1], fmt) for row in range(300)])
    assert np.array_equal(whole, alone)


@pytest.mark.parametrize("symmetric", [False, True])
def test_padding_does_not_disturb_the_ragged_block(symmetric: bool) -> None:
    fmt = block_format(4, 32, symmetric=symmetric)
    weight = _weight(8, 40)
    ragged = quantize_rtn(weight, fmt)
    assert ragged.packed.shape == (8, 2, 16)
    assert dequantize_weight(ragged).shape == (8, 40)
    tail = np.zeros((8, 32), np.float32)
    tail[:, :8] = weight[:, 32:]
    alone = dequantize_weight(quantize_rtn(tail, fmt))
    assert np.array_equal(dequantize_weight(ragged)[:, 32:], alone[:, :8])
    assert not alone[:, 8:].any()


def test_odd_block_counts_pad_the_zero_points() -> None:
    quantized = quantize_rtn(_weight(3, 96), block_format(4, 32, symmetric=False))
    assert quantized.zero_points is not None
    assert quantized.zero_points.shape == (3, 2)
    assert quantized.size_bytes == 3 * 48 + 3 * 3 * 4 + 6


def test_rows_of_lpbq_have_the_unit_that_the_npu_takes() -> None:
    fmt = block_format(4, 32, symmetric=True, block_scales="lpbq")
    blocks = to_blocks(_weight(16, 256), 32)
    grid = minmax_grid(blocks, fmt)
    assert grid.unit is not None
    searched = grid.unit.round(grid.scale * np.float32(0.85))  # no row reaches 16 multiples
    codes = round_to_grid(blocks, BlockGrid(searched, grid.zero_point, grid.unit), fmt)
    packed = to_quantized_weight(
        codes, BlockGrid(searched, grid.zero_point, grid.unit), fmt, 256, np.float32
    )
    assert (packed.scales.max(axis=1) == 16).all()
    before = dequantize(codes, BlockGrid(searched, grid.zero_point, grid.unit)).reshape(16, -1)
    lost = np.abs(dequantize_weight(packed) - before)
    # a code moves to the nearest level of a scale that is at most half a unit away
    scales = unpack_weight(packed)[1].scale
    assert (lost.reshape(blocks.shape) <= scales[..., np.newaxis] * 0.75).all()
    assert np.linalg.norm(lost) < 0.03 * np.linalg.norm(before)
