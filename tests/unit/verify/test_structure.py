"""The checker, the loader, and the hunt for nodes that are dequantized on every call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.errors import CorruptModelError, UnsupportedModelError, VerificationError
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import quantize_rtn
from faq_onnx.testing import write_tiny_llama
from faq_onnx.verify.nodes import LowBitSpec
from faq_onnx.verify.structure import check_structure, is_slow

FAST = LowBitSpec(64, 4, 32, 4, "float32", "uint8")


def _two_layers(path: Path, first_bits: int, accuracy_level: int) -> Path:
    """X -> MatMulNBits "first" -> MatMulNBits "second" (4 bits, accuracy_level 4)."""
    value = ir.Value(name="X", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    x = value
    nodes, constants = [], []
    for name, bits, level in (("first", first_bits, accuracy_level), ("second", 4, 4)):
        weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        quantized = quantize_rtn(weight, block_format(bits, 32, symmetric=True))
        arrays = {"B": quantized.packed, "scales": quantized.scales}
        inputs = [
            ir.Value(name=f"{name}.{key}", const_value=ir.tensor(array, name=f"{name}.{key}"))
            for key, array in arrays.items()
        ]
        attributes = {"K": 64, "N": 64, "bits": bits, "block_size": 32, "accuracy_level": level}
        items = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        node = ir.Node("com.microsoft", "MatMulNBits", [value, *inputs], items, name=name)
        value = node.outputs[0]
        value.name = f"{name}.output"
        nodes.append(node)
        constants += inputs
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 64])
    opsets = {"": 17, "com.microsoft": 1}
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=constants, opset_imports=opsets, name="g"
    )
    ir.save(ir.Model(graph, ir_version=8), path)
    return path


def test_a_fast_model_has_no_slow_nodes(tmp_path: Path) -> None:
    result = check_structure(_two_layers(tmp_path / "model.onnx", 4, 4))
    assert (result.ir_version, result.opset, result.nbits_nodes) == (8, 17, 2)
    assert result.slow_nodes == ()
    assert result.onnxruntime.startswith("1.")


def test_slow_nodes_are_named(tmp_path: Path) -> None:
    result = check_structure(_two_layers(tmp_path / "model.onnx", 8, 0))
    assert result.nbits_nodes == 2
    assert result.slow_nodes == ("first",)


def test_a_float_model_passes(tmp_path: Path) -> None:
    result = check_structure(write_tiny_llama(tmp_path))
    assert (result.nbits_nodes, result.slow_nodes) == (0, ())


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and whether the CPU provider is slow on it."""

    spec: LowBitSpec
    slow: bool


@pytest.mark.parametrize(
    "case",
    [
        Case(FAST, slow=False),
        Case(dataclasses.replace(FAST, accuracy_level=0), slow=False),
        Case(dataclasses.replace(FAST, scale_dtype="float16"), slow=False),
        Case(dataclasses.replace(FAST, zero_point_dtype=""), slow=False),
        Case(dataclasses.replace(FAST, zero_point_dtype="float32"), slow=True),
        Case(dataclasses.replace(FAST, bits=2, block_size=16), slow=True),
        Case(dataclasses.replace(FAST, in_features=100), slow=False),
    ],
)
def test_the_probe_knows_the_kernels(case: Case) -> None:
    assert is_slow(case.spec) == case.slow


def test_what_the_checker_refuses_is_a_verification_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    value = ir.Value(name="X", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Neg", [value, value], name="neg")  # Neg has one input
    node.outputs[0].name = "Y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 17}, name="g")
    ir.save(ir.Model(graph, ir_version=8), path)
    with pytest.raises(VerificationError, match=r"model\.onnx: the onnx checker refuses"):
        check_structure(path)


def test_a_bit_width_without_kernel_does_not_load(tmp_path: Path) -> None:
    path = _two_layers(tmp_path / "model.onnx", 4, 4)
    model = ir.load(path)
    model.graph[0].attributes["bits"] = ir.AttrInt64("bits", 3)
    ir.save(model, path)
    with pytest.raises(UnsupportedModelError, match="4b"):
        check_structure(path)


def test_a_truncated_file_is_corrupt(tmp_path: Path) -> None:
    path = _two_layers(tmp_path / "model.onnx", 4, 4)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptModelError):
        check_structure(path)
