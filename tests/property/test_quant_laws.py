"""Laws that hold for every weight and every format."""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.config import BlockScales
from faq_onnx.quant.formats import BLOCK_SIZES, CODE_BITS, block_format
from faq_onnx.quant.packing import pack_codes, packed_width, unpack_codes
from faq_onnx.quant.uniform import (
    code_limits,
    dequantize,
    dequantize_weight,
    fake_quantize,
    minmax_grid,
    quantize_rtn,
    round_to_grid,
    to_blocks,
    unpack_weight,
)

pytestmark = pytest.mark.property
FEW = settings(max_examples=60, deadline=None)

FORMATS = st.builds(
    block_format,
    st.sampled_from(CODE_BITS),
    st.sampled_from(BLOCK_SIZES[:3]),
    symmetric=st.booleans(),
)
STORED = st.builds(
    lambda fmt, scales: fmt.model_copy(update={"block_scales": scales}),
    FORMATS,
    st.sampled_from(get_args(BlockScales)),
)
# float32 relative rounding of w * (1 / scale) + zero_point is at most this many ulps of 255
CODE_ERROR = 4 * 256 * 2.0**-24


@st.composite
def weights(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Weights [N, K] of any scale, with zeros, outliers and one-sided blocks among them."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    # thousandths, not arbitrary floats: 1e-38 beside 1 only tests the floor of the scale
    thousandths = hnp.arrays(np.int32, (rows, columns), elements=st.integers(-1000, 1000))
    weight = draw(thousandths).astype(np.float32) / np.float32(1000)
    if draw(st.booleans()):
        weight = np.abs(weight)
    return (weight * np.float32(draw(st.sampled_from([1e-4, 1.0, 300.0])))).astype(np.float32)


@FEW
@given(st.sampled_from([2, 4, 8]), st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=9))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(codes, bits)
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert np.array_equal(unpack_codes(packed, bits, shape[-1]), codes)


@FEW
@given(weights(), FORMATS)
def test_rounding_is_at_most_half_a_step_inside_the_range(
    weight: npt.NDArray[np.float32], fmt: BlockFormat
) -> None:
    blocks = to_blocks(weight, fmt.block_size)
    grid = minmax_grid(blocks, fmt)
    codes = round_to_grid(blocks, grid, fmt)
    lowest, highest = code_limits(fmt)
    assert codes.min() >= lowest
    assert codes.max() <= highest
    steps = np.abs(dequantize(codes, grid).astype(np.float64) - blocks)
    steps /= np.abs(grid.scale.astype(np.float64))[..., np.newaxis]
    inside = (codes > lowest) & (codes < highest)
    assert (steps[inside] <= 0.5 + CODE_ERROR).all()
    # at the ends: half a step, plus what rounding the zero point or the short side cut off
    assert (steps <= 1.0 + CODE_ERROR).all()


@FEW
@given(weights(), STORED, st.sampled_from([np.float32, np.float16]))
def test_zero_stays_zero(
    weight: npt.NDArray[np.float32], fmt: BlockFormat, scale_dtype: type[np.floating]
) -> None:
    quantized = dequantize_weight(quantize_rtn(weight, fmt, scale_dtype))
    assert quantized.shape == weight.shape
    assert not quantized[weight == 0].any()


@FEW
@given(weights(), STORED, st.sampled_from([np.float32, np.float16]))
def test_the_search_loop_sees_what_is_written(
    weight: npt.NDArray[np.float32], fmt: BlockFormat, scale_dtype: type[np.floating]
) -> None:
    seen = fake_quantize(to_blocks(weight, fmt.block_size), fmt, scale_dtype=scale_dtype)
    written = dequantize_weight(quantize_rtn(weight, fmt, scale_dtype))
    assert np.array_equal(seen.reshape(len(weight), -1)[:, : weight.shape[1]], written)


@FEW
@given(weights(), FORMATS, st.sampled_from([0.25, 2.0, 64.0]))
def test_powers_of_two_scale_through(
    weight: npt.NDArray[np.float32], fmt: BlockFormat, factor: float
) -> None:
    plain = quantize_rtn(weight, fmt)
    scaled = quantize_rtn(weight * np.float32(factor), fmt)
    assert np.array_equal(plain.packed, scaled.packed)


@FEW
@given(weights(), STORED)
def test_rows_do_not_know_each_other(weight: npt.NDArray[np.float32], fmt: BlockFormat) -> None:
    whole = dequantize_weight(quantize_rtn(weight, fmt))
    first = dequantize_weight(quantize_rtn(weight[:1], fmt))
    assert np.array_equal(whole[:1], first)


@FEW
@given(weights(), STORED, st.sampled_from([np.float32, np.float16]))
def test_scales_in_8_bits_lose_half_a_unit_at_most(
    weight: npt.NDArray[np.float32], fmt: BlockFormat, scale_dtype: type[np.floating]
) -> None:
    fmt = fmt.model_copy(update={"block_scales": "8-bit"})
    blocks = to_blocks(weight, fmt.block_size)
    grid = minmax_grid(blocks, fmt, scale_dtype)
    assert grid.unit is not None
    exact = minmax_grid(blocks, fmt.model_copy(update={"block_scales": "float"}), scale_dtype)
    unit = grid.unit.values.astype(np.float64)
    # a unit in float16 is itself rounded, by 2^-25 where it is subnormal, and scales once more
    slack = 2.0**-9 * np.abs(exact.scale) + grid.unit.largest * 2.0**-25
    lost = np.abs(grid.scale - exact.scale)
    covered = (np.abs(exact.scale) >= unit) & ~(blocks == 0).all(axis=-1)
    if scale_dtype is np.float32:
        slack = np.full_like(slack, 2.0**-22 * np.abs(exact.scale).max())
    assert (lost <= unit / 2 + slack)[covered].all()
    packed = quantize_rtn(weight, fmt, scale_dtype)
    assert packed.scales.dtype.itemsize == 1
    assert (packed.scales != 0).all()
    np.testing.assert_array_equal(unpack_weight(packed)[1].scale, grid.scale)


@FEW
@given(weights(), st.sampled_from([np.float32, np.float16]))
def test_scales_of_lpbq_are_1_to_16_units(
    weight: npt.NDArray[np.float32], scale_dtype: type[np.floating]
) -> None:
    fmt = block_format(4, 16, symmetric=True, block_scales="lpbq")
    packed = quantize_rtn(weight, fmt, scale_dtype)
    assert packed.scales.min() >= 1
    assert packed.scales.max() <= 16
    assert packed.scale_unit is not None
    assert (packed.scale_unit > 0).all()
    largest = packed.scales.max(axis=1)
    # the block that needs the largest scale of its row gets it; rows of zeros need none
    assert (largest[weight.any(axis=1) & (packed.scale_unit[:, 0] > 2.0**-14)] == 16).all()
