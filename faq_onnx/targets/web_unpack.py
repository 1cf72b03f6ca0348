"""A second graph for WebAssembly, whose products read float weights that the page unpacks.

onnxruntime-web's WebAssembly has no low-bit kernel: MatMulNBits unpacks its whole weight at every
token. Unpacked once, when the model is loaded, a product is an ordinary one; it costs memory
instead. Both graphs share the packed weights, so the download stays as small as it was.
"""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import onnx_ir as ir

from faq_onnx.artifacts.record import Record
from faq_onnx.graph.io import load_model, save_structure

__all__ = ["UNPACKED_GRAPH", "Bytes", "PackedWeight", "write_unpacked_graph"]

UNPACKED_GRAPH = "model.wasm.onnx"
# The floats have to fit into WebAssembly's memory beside everything else, on a common device.
LARGEST_UNPACKED_BYTES = 1_200_000_000
_DOMAIN = "com.microsoft"
_SCALES, _ZERO_POINTS, _ORDER, _BIAS = 2, 3, 4, 5  # inputs of MatMulNBits; the order is g_idx
_SCALE_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
}


class Bytes(Record):
    """Where a tensor's bytes are: in a downloaded file, or here, where they are few."""

    file: str = ""
    offset: int = 0
    bytes: int = 0
    base64: str = ""


class PackedWeight(Record):
    """What the page needs to unpack one weight.

    Attributes:
        file: Where the graph looks for float32 [rows, width].
        rows: Output features.
        width: Input features.
        bits: Of a code.
        block: Codes that share a scale; the last block of a row may be padded.
        codes: Packed, low bits first.
        scales: [rows, blocks].
        scale_type: float32; or int8 or uint8: multiples of a unit.
        units: float32 [rows] of such multiples.
        zeros: Packed; none: half of the range.
    """

    file: str
    rows: int
    width: int
    bits: int
    block: int
    codes: Bytes
    scales: Bytes
    scale_type: str
    units: Bytes | None = None
    zeros: Bytes | None = None


def write_unpacked_graph(path: Path) -> tuple[PackedWeight, ...]:
    """Write the graph beside a model; nothing where there is no low-bit weight, or too much.

    Args:
        path: A model with its weights in files of their own.
    """
    model = load_model(path)
    nodes = [node for node in model.graph.all_nodes() if _packed_inputs(node) is not None]
    floats = sum(4 * _number(node, "N") * _number(node, "K") for node in nodes)
    if not nodes or floats > LARGEST_UNPACKED_BYTES:
        return ()
    weights = tuple(_unpack(node, f"unpacked.{at}", path) for at, node in enumerate(nodes))
    save_structure(model, path.with_name(UNPACKED_GRAPH))
    return weights


def _packed_inputs(node: ir.Node) -> tuple[ir.TensorProtocol, ...] | None:
    """Codes, scales and a unit of these, if the page can unpack them."""
    if (node.domain, node.op_type) != (_DOMAIN, "MatMulNBits") or _input(node, _ORDER) is not None:
        return None
    codes = _constant(_input(node, 1))
    zeros = _input(node, _ZERO_POINTS)
    constant = _constant(zeros)
    if zeros is not None and (constant is None or constant.dtype != ir.DataType.UINT8):
        return None
    parts = _scale_parts(_input(node, _SCALES))
    return None if codes is None or parts is None else (codes, *parts)


def _scale_parts(scales: ir.Value | None) -> tuple[ir.TensorProtocol, ...] | None:
    """Float32 scales, or their 8-bit multiples and float32 unit."""
    tensor = _constant(scales)
    if tensor is not None:
        return (tensor,) if tensor.dtype == ir.DataType.FLOAT else None
    product = None if scales is None else scales.producer()
    if product is None or product.op_type != "Mul":
        return None
    whole = product.inputs[0].producer() if product.inputs[0] is not None else None
    if whole is None or whole.op_type != "Cast":
        return None
    multiples, unit = _constant(whole.inputs[0]), _constant(product.inputs[1])
    if multiples is None or unit is None or unit.dtype != ir.DataType.FLOAT:
        return None
    return (multiples, unit) if multiples.dtype in _SCALE_TYPES else None


def _unpack(node: ir.Node, file: str, path: Path) -> PackedWeight:
    """Let a node read the float weight; says how to make that."""
    found = _packed_inputs(node)
    assert found is not None
    codes, scales, *unit = found
    zeros = _constant(_input(node, _ZERO_POINTS))
    rows, width = _number(node, "N"), _number(node, "K")
    weight = PackedWeight(
        file=file,
        rows=rows,
        width=width,
        bits=_number(node, "bits", 4),
        block=_number(node, "block_size"),
        codes=_place(codes),
        scales=_place(scales),
        scale_type=_SCALE_TYPES[scales.dtype],
        units=_place(unit[0]) if unit else None,
        zeros=None if zeros is None else _place(zeros),
    )
    shape = ir.Shape([rows, width])
    tensor = ir.ExternalTensor(
        file, 0, 4 * rows * width, ir.DataType.FLOAT, shape=shape, name=file, base_dir=path.parent
    )
    value = ir.Value(name=file, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph = node.graph
    assert graph is not None
    graph.register_initializer(value)
    old = [each for each in node.inputs[1:] if each is not None]
    inputs = [node.inputs[0], value]
    product = ir.node(
        "FusedMatMul", inputs, attributes={"transB": 1}, domain=_DOMAIN, name=node.name
    )
    made = [product]
    bias = _input(node, _BIAS)
    if bias is not None:
        old.remove(bias)
        made.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}/bias"))
        product.outputs[0].name = f"{node.name}/product"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], made, node.outputs, made[-1].outputs
    )
    _drop_unread(graph, old)
    return weight


def _drop_unread(graph: ir.Graph, values: list[ir.Value]) -> None:
    for value in values:
        if value.uses():
            continue
        producer = value.producer()
        if producer is not None:
            above = [each for each in producer.inputs if each is not None]
            graph.remove(producer, safe=True)
            _drop_unread(graph, above)
        elif value.is_initializer():
            graph.initializers.pop(value.name or "", None)


def _place(tensor: ir.TensorProtocol) -> Bytes:
    if isinstance(tensor, ir.ExternalTensor):
        size = tensor.length or tensor.nbytes
        return Bytes(file=Path(tensor.path).name, offset=tensor.offset or 0, bytes=size)
    content = np.ascontiguousarray(tensor.numpy()).tobytes()
    return Bytes(bytes=len(content), base64=base64.b64encode(content).decode())


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None and value.is_initializer() else None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _number(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes.get_int(name, default)
