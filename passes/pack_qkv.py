"""The products that make query, key and value of com.microsoft.GroupQueryAttention become one.

The activation is then quantized once instead of three times, and a thread pool starts once. No
numerics here: rows of the three weights are set one after the other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import join_tensors
from faq_onnx.passes.nodes import MICROSOFT_DOMAIN, add_initializer, remove_dead

__all__ = ["PackQkvPass", "attention_nodes", "is_packed"]

_ATTENTION = (MICROSOFT_DOMAIN, "GroupQueryAttention")
_MATMUL_NBITS = (MICROSOFT_DOMAIN, "MatMulNBits")
_MATMUL = ("", "MatMul")
# By operator, the axis of its constant inputs that counts output features.
_FEATURE_AXES: Mapping[tuple[str, str], int] = MappingProxyType({_MATMUL_NBITS: 0, _MATMUL: -1})
_ELEMENTWISE = ("Cast", "Mul")  # these multiply 8-bit block scales by the unit of their row
_QUERY, _KEY, _VALUE = range(3)


@dataclasses.dataclass(frozen=True)
class PackQkvPass(ir.passes.InPlacePass):
    """Compute query, key and value of each GroupQueryAttention in one product.

    1. The three are MatMul or MatMulNBits over the same activation, with the same attributes but
       for N, and the same kinds of constant inputs; all have a constant bias behind them, or none.
    2. Every constant is that of the query, followed by those of key and value. Block scales that
       the graph multiplies out are joined before they are multiplied.
    3. Where a constant or a result has other readers, the layer stays as it is.
    4. The new node's name joins those of the three: `attn/q_proj+k_proj+v_proj/MatMul_Q4`.
    5. A second run changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in graph order."""
        found = self.find(model)
        for attention, projections in found:
            _pack(attention, projections)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left to pack.

        Raises:
            RewriteError: for the first node that is.
        """
        for attention, _ in self.find(model):
            raise RewriteError(f"{attention.name}: was not rewritten; this is a bug in the pass")

    def find(self, model: ir.Model) -> list[tuple[ir.Node, list[Projection]]]:
        """Attention nodes that can be packed, with the projections of query, key and value."""
        pairs = [(node, _projections(node)) for node in attention_nodes(model)]
        return [(node, projections) for node, projections in pairs if projections]


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """What makes the query, key or value.

    Attributes:
        product: MatMul or MatMulNBits.
        bias: Constant of the Add behind it, None without.
        output: What attention reads.
    """

    product: ir.Node
    bias: ir.Value | None
    output: ir.Value

    @property
    def kind(self) -> tuple[str, str]:
        """Domain and operator of the product."""
        return self.product.domain, self.product.op_type

    @property
    def features(self) -> int:
        """N: output features."""
        if "N" in self.product.attributes:
            return self.product.attributes["N"].as_int()
        weight = self.product.inputs[1]
        size = None if weight is None or weight.shape is None else weight.shape[-1]
        assert isinstance(size, int)
        return size


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """All GroupQueryAttention, subgraphs included."""
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == _ATTENTION]


def is_packed(attention: ir.Node) -> bool:
    """Whether query, key and value are one input."""
    return attention.inputs[_KEY] is None


def _projections(attention: ir.Node) -> list[Projection]:
    """Those of query, key and value in this order; empty where they cannot be joined."""
    found = [_projection(value) for value in attention.inputs[: _VALUE + 1]]
    three = [projection for projection in found if projection is not None]
    if len(three) < len(found) or not all(_alike(three[0], other) for other in three[1:]):
        return []
    axis = _FEATURE_AXES[three[0].kind]
    constants = zip(*(each.product.inputs[1:] for each in three), strict=True)
    joinable = all(_can_join(values, axis) for values in constants)
    joinable = joinable and _can_join([each.bias for each in three], -1)
    return three if joinable and all(map(_has_whole_bias, three)) else []


def _projection(value: ir.Value | None) -> Projection | None:
    """The product behind a value, through the Add of a bias."""
    node = _sole_producer(value)
    if value is None or node is None:
        return None
    if node.op_type != "Add" or node.domain:
        return Projection(node, None, value) if _is_product(node) else None
    for product, bias in (node.inputs, node.inputs[::-1]):
        above = _sole_producer(product)
        if bias is not None and bias.is_initializer() and above is not None and _is_product(above):
            return Projection(above, bias, value)
    return None


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _FEATURE_AXES


def _sole_producer(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that has one reader."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    return value.producer()


def _alike(one: Projection, other: Projection) -> bool:
    return (
        one.kind == other.kind
        and one.product.inputs[0] is other.product.inputs[0]
        and len(one.product.inputs) == len(other.product.inputs)
        and _settings(one.product) == _settings(other.product)
        and one.product.graph is other.product.graph
    )


def _has_whole_bias(projection: Projection) -> bool:
    """Whether a bias, if there is one, has a number for each feature."""
    bias = projection.bias
    return bias is None or (bias.shape is not None and bias.shape[-1] == projection.features)


def _can_join(values: Sequence[ir.Value | None], axis: int) -> bool:
    """Whether these are absent, or constants of which one can be made."""
    present = [value for value in values if value is not None]
    if not present:
        return True
    if len(present) < len(values) or not all(_is_read_once(value) for value in present):
        return False
    nodes = [value.producer() for value in present]
    made = [node for node in nodes if node is not None]
    if not made:
        return _fit([value.const_value for value in present], axis)
    return len(made) == len(nodes) and _same_arithmetic(made, axis)


def _is_read_once(value: ir.Value) -> bool:
    inside = not value.is_graph_input() and not value.is_graph_output()
    return inside and len(value.uses()) == 1


def _fit(tensors: Sequence[ir.TensorProtocol | None], axis: int) -> bool:
    """Whether these are tensors of one type, with equal shapes but for `axis`."""
    shapes = set()
    for tensor in tensors:
        if tensor is None or not len(tensor.shape):
            return False
        dims = list(tensor.shape.numpy())
        dims[axis] = 0
        shapes.add((tensor.dtype, *dims))
    return len(shapes) == 1


def _same_arithmetic(nodes: Sequence[ir.Node], axis: int) -> bool:
    first, *others = nodes
    if first.domain or first.op_type not in _ELEMENTWISE:
        return False
    for other in others:
        same = (other.domain, other.op_type) == (first.domain, first.op_type)
        if not same or _settings(other) != _settings(first):
            return False
    return all(_can_join(values, axis) for values in zip(*(n.inputs for n in nodes), strict=True))


def _settings(node: ir.Node) -> dict[str, object]:
    """Attributes by name, without the number of output features."""
    return {name: attr.value for name, attr in node.attributes.items() if name != "N"}


def _pack(attention: ir.Node, projections: Sequence[Projection]) -> None:
    """Let attention read one product."""
    first = projections[0].product
    graph = first.graph
    assert isinstance(graph, ir.Graph)
    axis = _FEATURE_AXES[projections[0].kind]
    features = sum(each.features for each in projections)
    constants = zip(*(each.product.inputs[1:] for each in projections), strict=True)
    weights = [_join(graph, values, axis) for values in constants]
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", features)
    product = ir.Node(
        first.domain,
        first.op_type,
        [first.inputs[0], *weights],
        attributes.values(),
        name=_joined_name([each.product.name or "" for each in projections]),
        version=first.version,
    )
    nodes = [product]
    bias = _join(graph, [each.bias for each in projections], -1)
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{product.name}_bias"))
    old = projections[0].output
    for node in nodes:
        node.outputs[0].type = old.type
        if old.shape is not None:
            node.outputs[0].shape = ir.Shape([*list(old.shape)[:-1], features])
    packed = nodes[-1].outputs[0]
    packed.name = _joined_name([each.output.name or "" for each in projections])
    if bias is not None:
        product.outputs[0].name = f"{packed.name}_product"
    graph.insert_before(first, nodes)
    for index, value in ((_QUERY, packed), (_KEY, None), (_VALUE, None)):
        attention.replace_input_with(index, value)
    remove_dead(each.output for each in projections)


def _join(
    graph: ir.Graph, values: Sequence[ir.Value | None], axis: int
) -> ir.Value | None:
    """A constant that is those one after the other; None where they are absent."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    name = _joined_name([value.name or "" for value in present])
    nodes = [node for node in (value.producer() for value in present) if node is not None]
    if not nodes:
        tensors = [value.const_value for value in present if value.const_value is not None]
        return add_initializer(graph, name, join_tensors(tensors, axis))
    first = nodes[0]
    inputs = [_join(graph, each, axis) for each in zip(*(n.inputs for n in nodes), strict=True)]
    joined = ir.Node(
        first.domain,
        first.op_type,
        inputs,
        first.attributes.values(),
        name=_joined_name([node.name or "" for node in nodes]),
        version=first.version,
    )
    result = joined.outputs[0]
    result.name, result.type = name, first.outputs[0].type
    graph.insert_before(first, joined)
    return result


def _joined_name(names: Sequence[str]) -> str:
    """What names share, around what they do not: `a/q/x` and `a/k/x` give `a/q+k/x`."""
    parts = [re.split(r"(?<=[/.])|(?=[/.])", name) for name in names]
    shortest = min(map(len, parts))
    first = parts[0]
    before = 0
    while before < shortest and all(part[before] == first[before] for part in parts):
        before += 1
    after = 0
    while after < shortest - before and all(part[-1 - after] == first[-1 - after] for part in parts):
        after += 1
    middles = dict.fromkeys("".join(part[before : len(part) - after]) for part in parts)
    return "".join([*first[:before], "+".join(middles), *first[len(first) - after :]])
