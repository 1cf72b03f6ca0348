"""onnxruntime's kernels compute what our dequantization says, over every format."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.formats import BLOCK_SIZES, block_format, slow_path_reason
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.nodes import LowBitSpec, gather_model, matmul_model
from faq_onnx.verify.structure import is_slow

pytestmark = pytest.mark.parity

F32, F16 = 2.0**-24, 2.0**-11  # unit roundoffs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Odd sizes on purpose: ragged K, odd N, an odd number of blocks."""

    rows: int
    columns: int


SHAPES = (Shape(16, 768), Shape(33, 100), Shape(7, 290))


def _weight(shape: Shape) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return (rng.standard_normal((shape.rows, shape.columns)) * 0.05).astype(np.float32)


def _spec(bits: int, block_size: int, symmetric: bool, dtype: str, columns: int) -> LowBitSpec:
    return LowBitSpec(
        in_features=columns,
        bits=bits,
        block_size=block_size,
        accuracy_level=0,
        scale_dtype=dtype,
        zero_point_dtype="" if symmetric else "uint8",
    )


@pytest.mark.parametrize("code_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matmul_nbits(code_bits: int, block_size: int, symmetric: bool, dtype: str) -> None:
    fmt = block_format(code_bits, block_size, symmetric=symmetric)
    for shape in SHAPES:
        quantized = quantize_rtn(_weight(shape), fmt, dtype)
        weight = dequantize_weight(quantized).astype(np.float64)
        given = np.random.default_rng(2).standard_normal((3, shape.columns)).astype(dtype)
        exact = given.astype(np.float64) @ weight.T
        sizes = np.abs(given.astype(np.float64)) @ np.abs(weight).T
        # zero points may be summed apart: codes up to 2^b steps where the weight has half
        spread = (
            np.abs(given.astype(np.float64)).sum(axis=1, keepdims=True)
            * np.abs(quantized.scales.astype(np.float64)).max(axis=1)
            * 2 ** (fmt.storage_bits + 1)
        )
        exactly = (shape.columns + 4) * F32 * spread
        spec = _spec(fmt.storage_bits, block_size, symmetric, dtype, shape.columns)
        for accuracy_level in (0, 4):
            model = matmul_model(
                dataclasses.replace(spec, accuracy_level=accuracy_level),
                quantized.packed,
                quantized.scales,
                quantized.zero_points,
            )
            found = run_session(open_session(model, threads=1), {"A": given})["Y"]
            assert found.dtype == dtype
            tolerance = exactly + (F16 * np.abs(exact) if dtype == "float16" else 0)
            if accuracy_level == 4:
                # A is rounded to 8 bits by blocks: half a step of max|A| / 127 for each term
                largest = np.abs(given.astype(np.float64)).max(axis=1, keepdims=True)
                tolerance = tolerance + largest / 254 * np.abs(weight).sum(axis=1)
            assert (np.abs(found - exact) <= tolerance).all()
        # the tolerance at accuracy_level 0 means something: far below the result itself
        assert exactly.max() < 0.05 * sizes.min()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gather_block_quantized(bits: int, block_size: int, symmetric: bool, dtype: str) -> None:
    width = 3 * block_size
    fmt = block_format(bits, block_size, symmetric=symmetric)
    table = quantize_rtn(_weight(Shape(21, width)), fmt, dtype)
    spec = _spec(bits, block_size, symmetric, dtype, width)
    packed = table.packed.reshape(21, -1)
    model = gather_model(spec, packed, table.scales, table.zero_points)
    indices = np.array([0, 20, 3, 3])
    found = run_session(open_session(model), {"A": indices})["Y"]
    expected = dequantize_weight(table)[indices]
    # one product of an integer and a scale, rounded once: float32 must agree exactly
    tolerance = np.abs(expected) * (F16 if dtype == "float16" else 0)
    assert (np.abs(found.astype(np.float32) - expected) <= tolerance).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_format_table_knows_the_slow_paths(
    bits: int, block_size: int, accuracy_level: int, symmetric: bool
) -> None:
    spec = dataclasses.replace(
        _spec(bits, block_size, symmetric, "float32", 2 * block_size),
        accuracy_level=accuracy_level,
    )
    reason = slow_path_reason(bits, block_size, accuracy_level)
    assert is_slow(spec) == bool(reason)
