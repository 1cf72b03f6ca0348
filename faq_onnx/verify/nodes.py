"""The low-bit nodes of a model, read one at a time, and models of a single such node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.errors import VerificationError

__all__ = ["LowBitNode", "LowBitSpec", "gather_model", "low_bit_nodes", "matmul_model"]

Array = npt.NDArray[Any]

DOMAIN = "com.microsoft"
MATMUL = "MatMulNBits"
GATHER = "GatherBlockQuantized"
# IR 8 and opset 17 load in every onnxruntime that has MatMulNBits.
PROBE_IR_VERSION = 8
PROBE_OPSET = 17


@dataclasses.dataclass(frozen=True)
class LowBitSpec:
    """What decides the layout and the kernel of a low-bit node.

    Attributes:
        in_features: K; for a Gather the width of the table.
        bits: Bits per code in the file.
        block_size: Elements that share a scale.
        accuracy_level: Of MatMulNBits; 0 for a Gather.
        scale_dtype: numpy name: "float32", "float16" or "bfloat16".
        zero_point_dtype: "uint8" (packed), a float name, or "" without zero points.
    """

    in_features: int
    bits: int
    block_size: int
    accuracy_level: int
    scale_dtype: str
    zero_point_dtype: str


@dataclasses.dataclass(frozen=True)
class _Product:
    """Scales that the graph multiplies out of 8-bit multiples and one unit per row."""

    multiples: ir.TensorProtocol
    unit: ir.TensorProtocol

    @property
    def parts(self) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        """Tensors of the file."""
        return self.multiples, self.unit

    @property
    def size(self) -> int:
        """Number of scales."""
        return self.multiples.size

    @property
    def shape(self) -> ir.Shape:
        """As `multiples`."""
        return ir.Shape(self.multiples.shape.numpy())

    @property
    def dtype(self) -> ir.DataType:
        """As `unit`."""
        return self.unit.dtype

    def numpy(self) -> Array:
        """[N, k_blocks] in the dtype of the unit; multiplied in float32."""
        multiples = np.asarray(self.multiples.numpy()).astype(np.float32)
        unit = np.asarray(self.unit.numpy())
        return (multiples * unit.astype(np.float32)).astype(unit.dtype)


@dataclasses.dataclass(frozen=True)
class LowBitNode:
    """A MatMulNBits or GatherBlockQuantized node.

    Attributes:
        name: Node name, or its output value's where nodes are unnamed.
        op_type: Operator.
        rows: N, or the size of the vocabulary.
        spec: Layout.
    """

    name: str
    op_type: str
    rows: int
    spec: LowBitSpec
    _packed: ir.TensorProtocol
    _scales: ir.TensorProtocol | _Product
    _zero_points: ir.TensorProtocol | None

    @property
    def k_blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.spec.in_features // self.spec.block_size)

    @property
    def largest_multiple(self) -> int | None:
        """Of the integers that the graph multiplies scales out of; None of float scales."""
        if not isinstance(self._scales, _Product):
            return None
        return int(np.asarray(self._scales.multiples.numpy()).astype(np.int64).max())

    def packed(self, rows: slice) -> npt.NDArray[np.uint8]:
        """Some rows of the codes, uint8 [rows, bytes]."""
        return np.asarray(self._packed.numpy()).reshape(self.rows, -1)[rows].copy()

    def scales(self, rows: slice) -> npt.NDArray[np.float32]:
        """Some rows of the scales, float32 [rows, k_blocks]."""
        return np.asarray(self._scales.numpy()).reshape(self.rows, -1)[rows].astype(np.float32)

    def zero_points(self, rows: slice) -> Array | None:
        """Some rows of the zero points as stored, None without."""
        if self._zero_points is None:
            return None
        return np.asarray(self._zero_points.numpy()).reshape(self.rows, -1)[rows].copy()

    def release(self) -> None:
        """Unmap its tensors, so that checked weights leave memory; arrays given out are copies."""
        for tensor in (self._packed, self._scales, self._zero_points):
            parts = tensor.parts if isinstance(tensor, _Product) else (tensor,)
            for part in parts:
                if isinstance(part, ir.ExternalTensor):
                    part.release()


def low_bit_nodes(model: ir.Model) -> Iterator[LowBitNode]:
    """All low-bit nodes with constant weights in graph order, subgraphs included.

    Raises:
        VerificationError: A node lacks weights, scales or a required attribute.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == DOMAIN and node.op_type in {MATMUL, GATHER}:
            yield _parse(node)


def matmul_model(
    spec: LowBitSpec,
    packed: npt.NDArray[np.uint8],
    scales: Array,
    zero_points: Array | None,
) -> bytes:
    """A model "Y = MatMulNBits(A)" with constant weights.

    Args:
        spec: Layout and accuracy level.
        packed: uint8 [N, k_blocks, bytes per block].
        scales: [N, k_blocks] in the dtype that A shall have.
        zero_points: As stored, or None.

    Returns:
        The serialized model; A is [M, K], Y is [M, N].
    """
    dtype = ir.DataType.from_numpy(scales.dtype)
    features = len(packed)
    constants = _constants({"B": packed, "scales": scales, "zero_points": zero_points})
    activation = _value("A", dtype, ("M", spec.in_features))
    result = _value("Y", dtype, ("M", features))
    attributes = {
        "K": spec.in_features,
        "N": features,
        "bits": spec.bits,
        "block_size": spec.block_size,
        "accuracy_level": spec.accuracy_level,
    }
    node = _node(MATMUL, [activation, *constants], attributes, result)
    return _serialize(node, activation, constants)


def gather_model(
    spec: LowBitSpec,
    packed: npt.NDArray[np.uint8],
    scales: Array,
    zero_points: Array | None,
) -> bytes:
    """A model "Y = GatherBlockQuantized(data, A)" with a constant table.

    Args:
        spec: Layout.
        packed: uint8 [rows, bytes].
        scales: [rows, blocks] in the dtype that Y shall have.
        zero_points: Packed, or None.

    Returns:
        The serialized model; A is int64 [M], Y is [M, width].
    """
    constants = _constants({"data": packed, "scales": scales, "zero_points": zero_points})
    indices = _value("A", ir.DataType.INT64, ("M",))
    result = _value("Y", ir.DataType.from_numpy(scales.dtype), ("M", spec.in_features))
    attributes = {
        "bits": spec.bits,
        "block_size": spec.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    inputs = [constants[0], indices, *constants[1:]]
    return _serialize(_node(GATHER, inputs, attributes, result), indices, constants)


def _value(name: str, dtype: ir.DataType, dims: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _constants(arrays: dict[str, Array | None]) -> list[ir.Value]:
    values = []
    for name, array in arrays.items():
        if array is not None:
            value = _value(name, ir.DataType.from_numpy(array.dtype), array.shape)
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
            values.append(value)
    return values


def _node(
    op_type: str, inputs: list[ir.Value], attributes: dict[str, int], result: ir.Value
) -> ir.Node:
    items = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    return ir.Node(DOMAIN, op_type, inputs, items, outputs=[result], name="probe")


def _serialize(node: ir.Node, given: ir.Value, constants: list[ir.Value]) -> bytes:
    graph = ir.Graph(
        [given],
        node.outputs,
        nodes=[node],
        initializers=constants,
        opset_imports={"": PROBE_OPSET, DOMAIN: 1},
        name="probe",
    )
    model = ir.Model(graph, ir_version=PROBE_IR_VERSION)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _parse(node: ir.Node) -> LowBitNode:
    is_matmul = node.op_type == MATMUL
    name = node.name or node.outputs[0].name or node.op_type
    places = (1, 2, 3) if is_matmul else (0, 2, 3)
    packed, zero_points = (_constant(node, place) for place in places[::2])
    scales = _constant(node, places[1]) or _product(node, places[1])
    if packed is None or scales is None:
        raise VerificationError(f"{name} ({node.op_type}): weights or scales are not constant")
    block_size, bits = _integer(node, "block_size", name), node.attributes.get_int("bits", 4)
    if is_matmul:
        rows, width = _integer(node, "N", name), _integer(node, "K", name)
    else:
        rows = int(scales.shape.numpy()[0])
        width = packed.size // rows * 8 // bits
    spec = LowBitSpec(
        in_features=width,
        bits=bits,
        block_size=block_size,
        accuracy_level=node.attributes.get_int("accuracy_level", 0),
        scale_dtype=str(scales.dtype.numpy()),
        zero_point_dtype="" if zero_points is None else str(zero_points.dtype.numpy()),
    )
    _check_sizes(name, rows, spec, (packed.size, scales.size))
    return LowBitNode(name, node.op_type, rows, spec, packed, scales, zero_points)


def _check_sizes(name: str, rows: int, spec: LowBitSpec, found: tuple[int, int]) -> None:
    k_blocks = -(-spec.in_features // spec.block_size)
    needed = (rows * k_blocks * spec.block_size * spec.bits // 8, rows * k_blocks)
    if found != needed:
        raise VerificationError(
            f"{name}: {rows} rows of {k_blocks} blocks need {needed[0]} weight bytes and "
            f"{needed[1]} scales, the file has {found[0]} and {found[1]}"
        )


def _constant(node: ir.Node, place: int) -> ir.TensorProtocol | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    # a table shared with MatMulNBits reaches the Gather through Reshape([V, -1])
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in {"Reshape", "Identity"}:
            return None
        value = producer.inputs[0]
    return None if value is None else value.const_value


def _product(node: ir.Node, place: int) -> _Product | None:
    """Scales that are stored in 8 bits: Mul(Cast(multiples), unit), in float16 with more Casts."""
    product = _above(node, place)
    if product is not None and product.op_type == "Cast":
        product = _above(product, 0)
    if product is None or product.op_type != "Mul":
        return None
    parts = []
    for side in (0, 1):
        cast = _above(product, side)
        holder = (product, side) if cast is None or cast.op_type != "Cast" else (cast, 0)
        parts.append(_constant(*holder))
    multiples, unit = parts
    return None if multiples is None or unit is None else _Product(multiples, unit)


def _above(node: ir.Node, place: int) -> ir.Node | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    return None if value is None else value.producer()


def _integer(node: ir.Node, attribute: str, name: str) -> int:
    if attribute not in node.attributes:
        raise VerificationError(f"{name} ({node.op_type}): attribute {attribute} is missing")
    return node.attributes[attribute].as_int()
