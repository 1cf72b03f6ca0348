"""Our round-to-nearest is onnxruntime's MatMulNBitsQuantizer DEFAULT, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
    MatMulNBitsQuantizer,
)

from faq_onnx.quant.formats import block_format
from faq_onnx.quant.packing import unpack_codes
from faq_onnx.quant.uniform import quantize_rtn

pytestmark = pytest.mark.parity


def _weight(kind: str, rows: int, columns: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.05)
    if kind == "coarse":  # few mantissa bits, so that exact ties between codes occur
        weight = np.round(weight * 256) / np.float32(256)
    elif kind == "positive":
        weight = np.abs(weight)
    elif kind == "negative":
        weight = -np.abs(weight)
    elif kind == "outliers":
        weight[:, ::37] *= 50
    # in a block of zeros onnxruntime stores scale 0, we store 1
    weight[weight == 0] = np.float32(1 / 256)
    return weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_same_bytes(bits: int, block_size: int, symmetric: bool, dtype: type[np.floating]) -> None:
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=symmetric, accuracy_level=4, bits=bits
    )
    fmt = block_format(bits, block_size, symmetric=symmetric)
    for kind in ("normal", "coarse", "positive", "negative", "outliers"):
        weight = _weight(kind, 24, 3 * block_size).astype(dtype)
        theirs = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
            np.ascontiguousarray(weight.T)
        )
        ours = quantize_rtn(weight, fmt, dtype)
        assert np.array_equal(ours.packed, theirs[0]), kind
        assert np.array_equal(ours.scales, theirs[1]), kind
        assert ours.scales.dtype == theirs[1].dtype
        if not symmetric:
            assert ours.zero_points is not None
            # 3 blocks: what the unused bits of the last byte hold is nobody's business
            expected = unpack_codes(theirs[2], bits, 3)
            assert np.array_equal(unpack_codes(ours.zero_points, bits, 3), expected), kind


@pytest.mark.parametrize("symmetric", [False, True])
def test_same_bytes_through_the_whole_tool_with_ragged_k(symmetric: bool) -> None:
    weight = _weight("normal", 33, 100)
    given = ir.Value(name="A", shape=ir.Shape(["M", 100]), type=ir.TensorType(ir.DataType.FLOAT))
    result = ir.Value(name="Y", shape=ir.Shape(["M", 33]), type=ir.TensorType(ir.DataType.FLOAT))
    constant = ir.Value(name="W", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="W"))
    node = ir.Node("", "MatMul", [given, constant], outputs=[result], name="mm")
    graph = ir.Graph(
        [given], [result], nodes=[node], initializers=[constant], opset_imports={"": 17}, name="g"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=8))
    tool = MatMulNBitsQuantizer(proto, bits=4, block_size=32, is_symmetric=symmetric)
    tool.process()
    found = {t.name: ir.from_proto(t).numpy() for t in tool.model.model.graph.initializer}
    ours = quantize_rtn(weight, block_format(4, 32, symmetric=symmetric))
    # behind K onnxruntime stores code 0 where we store the zero point, which stands for 0.0
    codes = unpack_codes(ours.packed, 4, 32).reshape(33, -1)[:, :100]
    assert np.array_equal(codes, unpack_codes(found["W_Q4"], 4, 32).reshape(33, -1)[:, :100])
    assert np.array_equal(ours.scales, found["W_scales"])
    if not symmetric:
        assert ours.zero_points is not None
        assert np.array_equal(ours.zero_points, found["W_zero_points"])
