"""Kernel checks pass on good files and see every kind of wrong byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import VerificationError
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.packing import unpack_codes
from faq_onnx.quant.uniform import quantize_rtn
from faq_onnx.verify import kernels
from faq_onnx.verify.kernels import check_kernels
from faq_onnx.verify.nodes import LowBitSpec, gather_model, low_bit_nodes, matmul_model

ROWS = 24


def _quantized(bits: int, width: int, *, symmetric: bool, dtype: str) -> QuantizedWeight:
    weight = np.random.default_rng(0).standard_normal((ROWS, width)).astype(np.float32)
    return quantize_rtn(weight, block_format(bits, 32, symmetric=symmetric), dtype)


def _spec(weight: QuantizedWeight) -> LowBitSpec:
    return LowBitSpec(
        in_features=weight.in_features,
        bits=weight.format.storage_bits,
        block_size=weight.format.block_size,
        accuracy_level=4,
        scale_dtype=str(weight.scales.dtype),
        zero_point_dtype="" if weight.zero_points is None else "uint8",
    )


def _file(folder: Path, weight: QuantizedWeight) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(matmul_model(_spec(weight), weight.packed, weight.scales, weight.zero_points))
    return path


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [320, 100])
def test_good_files_pass(
    tmp_path: Path, bits: int, symmetric: bool, dtype: str, width: int
) -> None:
    weight = _quantized(bits, width, symmetric=symmetric, dtype=dtype)
    result = check_kernels(_file(tmp_path, weight))
    assert result.nodes == 1
    assert result.worst <= 1
    assert result.worst_node == "probe"


def test_pieces_of_rows_cover_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[slice] = []
    original = kernels._ratio  # noqa: SLF001  spied on, not used

    def spy(node: Any, rows: slice) -> float:
        seen.append(rows)
        return original(node, rows)

    monkeypatch.setattr(kernels, "PIECE_ELEMENTS", 10 * 320)
    monkeypatch.setattr(kernels, "_ratio", spy)
    weight = _quantized(4, 320, symmetric=False, dtype="float32")
    assert check_kernels(_file(tmp_path, weight)).worst <= 1
    assert seen == [slice(0, 10), slice(10, 20), slice(20, 24)]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_wrong_order_of_codes_in_a_byte_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    def high_bits_first(
        packed: npt.NDArray[np.uint8], storage_bits: int, count: int
    ) -> npt.NDArray[np.uint8]:
        codes = unpack_codes(packed, storage_bits, packed.shape[-1] * 8 // storage_bits)
        per_byte = 8 // storage_bits
        swapped = codes.reshape(*codes.shape[:-1], -1, per_byte)[..., ::-1]
        return swapped.reshape(codes.shape)[..., :count]

    path = _file(tmp_path, _quantized(bits, 320, symmetric=True, dtype="float32"))
    monkeypatch.setattr(kernels, "unpack_codes", high_bits_first)
    assert check_kernels(path).worst > 10


def test_a_wrong_packing_of_zero_points_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped_zero_points(
        packed: npt.NDArray[np.uint8], storage_bits: int, count: int
    ) -> npt.NDArray[np.uint8]:
        if packed.ndim == 2:  # zero points; codes have three dimensions
            packed = (packed << 4 | packed >> 4).astype(np.uint8)
        return unpack_codes(packed, storage_bits, count)

    path = _file(tmp_path, _quantized(4, 320, symmetric=False, dtype="float32"))
    monkeypatch.setattr(kernels, "unpack_codes", swapped_zero_points)
    assert check_kernels(path).worst > 10


def test_scales_that_are_not_finite_are_seen(tmp_path: Path) -> None:
    weight = _quantized(4, 320, symmetric=False, dtype="float32")
    weight.scales[3, 2] = np.nan
    result = check_kernels(_file(tmp_path, weight))
    assert not result.worst <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_low_bit_embeddings_are_checked_too(tmp_path: Path, bits: int, symmetric: bool) -> None:
    weight = _quantized(bits, 320, symmetric=symmetric, dtype="float16")
    path = tmp_path / "model.onnx"
    packed = weight.packed.reshape(ROWS, -1)
    path.write_bytes(gather_model(_spec(weight), packed, weight.scales, weight.zero_points))
    result = check_kernels(path)
    assert result.nodes == 1
    assert result.worst <= 1


def test_a_table_shared_through_a_reshape_is_read(tmp_path: Path) -> None:
    weight = _quantized(4, 320, symmetric=False, dtype="float32")
    spec = _spec(weight)
    packed = weight.packed.reshape(ROWS, -1)
    model = _parsed(gather_model(spec, packed, weight.scales, weight.zero_points))
    gather = model.graph[0]
    table = gather.inputs[0]
    assert table is not None
    table.const_value = ir.tensor(weight.packed, name="data")
    table.shape = ir.Shape(weight.packed.shape)
    shape = ir.Value(name="shape", const_value=ir.tensor(np.array([ROWS, -1]), name="shape"))
    model.graph.register_initializer(shape)
    reshape = ir.Node("", "Reshape", [table, shape], name="reshape")
    reshape.outputs[0].name = "flat"
    gather.replace_input_with(0, reshape.outputs[0])
    model.graph.insert_before(gather, reshape)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    result = check_kernels(path)
    assert (result.nodes, result.worst <= 1) == (1, True)


def _parsed(serialized: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(serialized))


def test_sizes_that_contradict_the_attributes_are_refused() -> None:
    weight = _quantized(4, 320, symmetric=False, dtype="float32")
    spec = dataclasses.replace(_spec(weight), in_features=640)
    model = _parsed(matmul_model(spec, weight.packed, weight.scales, weight.zero_points))
    with pytest.raises(VerificationError, match=r"probe: 24 rows of 20 blocks need 7680 weight"):
        list(low_bit_nodes(model))


def test_a_model_without_low_bit_nodes_has_nothing_to_check(tmp_path: Path) -> None:
    value = ir.Value(name="X", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Neg", [value], name="neg")
    node.outputs[0].name = "Y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 17}, name="g")
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=8), path)
    assert check_kernels(path).nodes == 0
