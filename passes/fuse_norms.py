"""Decomposed RMS norms become one SimplifiedLayerNormalization.

onnxruntime's CPU provider does this by itself when it loads a model. Compilers that compute in
float16 must be given the operator: in the middle of the decomposed form stands the square of the
hidden state, which overflows where a channel is larger than 255, and every decoder has such ones.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faq_onnx.passes.nodes import add_initializer, become, remove_dead

__all__ = ["FuseNormsPass", "UnitRows", "match_unit_rows"]

_OPERATOR = "SimplifiedLayerNormalization"  # onnxruntime keeps it in the default domain
_FEWEST_CHANNELS = 2  # one number is a factor, not a gain


@dataclasses.dataclass(frozen=True)
class FuseNormsPass(ir.passes.InPlacePass):
    """Compute x / sqrt(mean(x^2) + epsilon) * gain in one node.

    1. The mean is that of the last axis; the inverse root is 1 / Sqrt, Reciprocal, or a division.
    2. A gain of one constant vector, in the type of x, goes into the node; any other stays behind
       it, and the node gets a gain of ones.
    3. The last value of the pattern keeps its name, type and shape.
    4. What does not match stays. A second run changes nothing.

    Attributes:
        min_width: Norms over fewer channels stay.
    """

    min_width: int = 2

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm that there is."""
        means = [node for node in model.graph.all_nodes() if node.op_type == "ReduceMean"]
        found = [norm for norm in map(_match, means) if norm is not None]
        norms = [norm for norm in found if norm.width >= self.min_width]
        for norm in norms:
            _fuse(norm)
        return ir.passes.PassResult(model, modified=bool(norms))


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A norm as it was found.

    Attributes:
        last: Node whose output is the result.
        value: What is normalised.
        gain: Constant vector; None takes ones.
        width: Channels.
        epsilon: Added to the mean.
    """

    last: ir.Node
    value: ir.Value
    gain: ir.Value | None
    width: int
    epsilon: float


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """x / sqrt(mean(x^2) + epsilon), a norm without its gain.

    Attributes:
        value: x.
        scaled: Node whose output is the result.
        epsilon: Added to the mean.
    """

    value: ir.Value
    scaled: ir.Node
    epsilon: float


def match_unit_rows(mean: ir.Node) -> UnitRows | None:
    """The decomposed norm around a ReduceMean, up to its gain; None where there is none."""
    value = _squared(mean.inputs[0])
    if value is None or not _over_last_axis(mean):
        return None
    shifted = _only_reader(mean, "Add")
    if shifted is None:
        return None
    epsilon = _scalar(_other(shifted, mean.outputs[0]))
    root = _only_reader(shifted, "Sqrt")
    scaled = None if root is None else _divided(root, value)
    if epsilon is None or scaled is None:
        return None
    return UnitRows(value, scaled, epsilon)


def _match(mean: ir.Node) -> _Norm | None:
    """The norm around a ReduceMean."""
    unit = match_unit_rows(mean)
    return None if unit is None else _with_gain(unit.scaled, unit.value, unit.epsilon)


def _squared(value: ir.Value | None) -> ir.Value | None:
    """What is squared, as a power or a product."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Pow" and _scalar(node.inputs[1]) == 2:
        return node.inputs[0]
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    return None


def _over_last_axis(mean: ir.Node) -> bool:
    if mean.attributes.get_int("keepdims", 1) != 1:
        return False
    if "axes" in mean.attributes:
        return list(mean.attributes["axes"].as_ints()) == [-1]
    return len(mean.inputs) > 1 and _scalar(mean.inputs[1]) == -1


def _divided(root: ir.Node, value: ir.Value) -> ir.Node | None:
    """The node of x / root, however it is written."""
    reader = _only_reader(root, "Div", "Reciprocal")
    if reader is None:
        return None
    if reader.op_type == "Div" and reader.inputs[0] is value:
        return reader
    if reader.op_type == "Div" and _scalar(reader.inputs[0]) != 1:
        return None
    product = _only_reader(reader, "Mul")
    if product is None or _other(product, reader.outputs[0]) is not value:
        return None
    return product


def _with_gain(scaled: ir.Node, value: ir.Value, epsilon: float) -> _Norm | None:
    """The norm with its gain, where that is a constant vector of the same type."""
    dtype = _dtype(value)
    product, normal, cast_to = _only_reader(scaled, "Mul", "Cast"), scaled.outputs[0], dtype
    if product is not None and product.op_type == "Cast":
        cast_to, normal = ir.DataType(product.attributes.get_int("to", 0)), product.outputs[0]
        product = _only_reader(product, "Mul")
    gain = None if product is None else _other(product, normal)
    width = _vector_width(gain)
    fits = cast_to == dtype and gain is not None and dtype in {None, gain.dtype}
    if product is not None and gain is not None and width is not None and fits:
        return _Norm(product, value, gain, width, epsilon)
    found = width if value.shape is None else value.shape[-1]
    if not isinstance(found, int) or dtype is None:
        return None
    return _Norm(scaled, value, None, found, epsilon)


def _vector_width(gain: ir.Value | None) -> int | None:
    """Channels of an initializer with one dimension."""
    tensor = None if gain is None or not gain.is_initializer() else gain.const_value
    if tensor is None or len(tensor.shape) != 1 or tensor.size < _FEWEST_CHANNELS:
        return None
    return int(tensor.size)


def _dtype(value: ir.Value) -> ir.DataType | None:
    """Type of a value, as far as the graph tells without inference."""
    node = value.producer()
    if value.dtype is None and node is not None and node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0))
    return value.dtype


def _fuse(norm: _Norm) -> None:
    graph = norm.last.graph
    assert isinstance(graph, ir.Graph)
    gain = norm.gain
    if gain is None:
        dtype = _dtype(norm.value)
        assert dtype is not None
        ones = np.ones(norm.width, dtype.numpy())
        gain = add_initializer(graph, f"{norm.last.outputs[0].name}_ones", ir.tensor(ones))
    before = [value for value in norm.last.inputs if value is not None]
    become(norm.last, "", _OPERATOR, [norm.value, gain])
    norm.last.attributes["axis"] = ir.AttrInt64("axis", -1)
    norm.last.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.epsilon)
    remove_dead(value for value in before if value not in {norm.value, gain})


def _only_reader(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The one node that reads the output, if it is of one of these types."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type not in op_types:
        return None
    return uses[0].node


def _other(node: ir.Node, operand: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not this one."""
    return next((value for value in node.inputs if value is not operand), None)


def _scalar(value: ir.Value | None) -> float | None:
    """The number of a constant with one element."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))
