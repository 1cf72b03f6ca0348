"""The products that make query, key and value of com.microsoft.GroupQueryAttention become one.

Its activation is then quantized once instead of three times. No numerics here: rows of the three
weights are set one after another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import join_tensors
from faq_onnx.passes.nodes import MICROSOFT_DOMAIN, add_initializer, remove_dead, take_place

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
       the graph multiplies out are joined before they are multiplied. A constant with another
       reader would be stored twice, so such a layer stays as it is.
    3. Attention reads the product itself, and no key and value. Where somebody else reads one of
       the three, such as a norm, a Split gives them back under their names.
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
        output: Of the Add, or of the product.
    """

    product: ir.Node
    bias: ir.Value | None
    output: ir.Value

    @classmethod
    def of(cls, product: ir.Node) -> Projection:
        """With the bias behind it."""
        rows = product.outputs[0]
        uses = rows.uses()
        reader = next(iter(uses)).node if len(uses) == 1 and not rows.is_graph_output() else None
        if reader is None or reader.op_type != "Add" or reader.domain:
            return cls(product, None, rows)
        bias = next((value for value in reader.inputs if value is not rows), None)
        if bias is None or not bias.is_initializer():
            return cls(product, None, rows)
        return cls(product, bias, reader.outputs[0])

    @property
    def kind(self) -> tuple[str, str]:
        """Domain and operator of the product."""
        return self.product.domain, self.product.op_type

    @property
    def constants(self) -> Sequence[ir.Value | None]:
        """Inputs of the product but for the activation."""
        return self.product.inputs[1:]

    @property
    def features(self) -> int | None:
        """N: output features."""
        if "N" in self.product.attributes:
            return self.product.attributes["N"].as_int()
        weight = self.product.inputs[1]
        size = None if weight is None or weight.shape is None else weight.shape[-1]
        return size if isinstance(size, int) else None


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """All GroupQueryAttention, subgraphs included."""
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == _ATTENTION]


def is_packed(attention: ir.Node) -> bool:
    """Whether query, key and value come from one product."""
    if attention.inputs[_KEY] is None:
        return True
    products = {_product(value) for value in attention.inputs[: _VALUE + 1]}
    return len(products) == 1 and None not in products


def _projections(attention: ir.Node) -> list[Projection]:
    """Those of query, key and value in this order; empty where they cannot be joined."""
    products = [_product(value) for value in attention.inputs[: _VALUE + 1]]
    three = [Projection.of(node) for node in products if node is not None]
    if len({each.product for each in three}) < len(products):
        return []
    axis = _FEATURE_AXES[three[0].kind]
    joinable = (
        all(_alike(three[0], other) for other in three[1:])
        and all(_can_join(values, axis) for values in zip(*_constants(three), strict=True))
        and _can_join([each.bias for each in three], -1)
        and all(map(_is_complete, three))
    )
    return three if joinable else []


def _product(value: ir.Value | None) -> ir.Node | None:
    """The one product that a value is made of without another between; None for none or more."""
    found: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    pending = [value]
    while pending and len(found) <= 1:
        each = pending.pop()
        node = None if each is None or each in seen else each.producer()
        if each is None or node is None:
            continue
        seen.add(each)
        if (node.domain, node.op_type) in _FEATURE_AXES:
            found.add(node)
        elif node.op_type != "Shape":  # sizes are no part of it
            pending += node.inputs
    return found.pop() if len(found) == 1 else None


def _constants(projections: Sequence[Projection]) -> list[Sequence[ir.Value | None]]:
    return [each.constants for each in projections]


def _alike(one: Projection, other: Projection) -> bool:
    return (
        one.kind == other.kind
        and one.product.inputs[0] is other.product.inputs[0]
        and len(one.constants) == len(other.constants)
        and _settings(one.product) == _settings(other.product)
        and one.product.graph is other.product.graph
    )


def _settings(node: ir.Node) -> dict[str, object]:
    """Attributes by name, without the number of output features."""
    return {name: attr.value for name, attr in node.attributes.items() if name != "N"}


def _is_complete(projection: Projection) -> bool:
    """Whether features are known, and a bias has a number for each of them."""
    bias, features = projection.bias, projection.features
    if features is None:
        return False
    return bias is None or (bias.shape is not None and bias.shape[-1] == features)


def _can_join(values: Sequence[ir.Value | None], axis: int) -> bool:
    """Whether these are absent, or constants of which one can be made."""
    present = [value for value in values if value is not None]
    if not present:
        return True
    if len(present) < len(values) or not all(map(_is_read_once, present)):
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


def _pack(attention: ir.Node, projections: Sequence[Projection]) -> None:
    """Put one product in the place of three."""
    first = projections[0].product
    activation, graph = first.inputs[0], first.graph
    assert activation is not None
    assert isinstance(graph, ir.Graph)
    nodes = _joined_product(graph, projections)
    outputs = [each.output for each in projections]
    direct = all(_is_read_once(value) for value in outputs) and outputs == [
        *attention.inputs[: _VALUE + 1]
    ]
    if not direct:
        nodes.append(_split(graph, nodes[-1].outputs[0], projections))
    above = activation.producer()
    if above is not None and above.graph is graph:
        graph.insert_after(above, nodes)
    else:
        graph.insert_before(graph[0], nodes)
    if direct:
        for index, value in ((_QUERY, nodes[-1].outputs[0]), (_KEY, None), (_VALUE, None)):
            attention.replace_input_with(index, value)
    else:
        for new, old in zip(nodes[-1].outputs, outputs, strict=True):
            take_place(new, old)
    remove_dead(outputs)


def _joined_product(graph: ir.Graph, projections: Sequence[Projection]) -> list[ir.Node]:
    """The product, behind what makes its constants, and in front of its bias."""
    first = projections[0].product
    axis = _FEATURE_AXES[projections[0].kind]
    nodes: list[ir.Node] = []
    weights = [
        _join(graph, values, axis, nodes) for values in zip(*_constants(projections), strict=True)
    ]
    features = sum(each.features or 0 for each in projections)
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
    made = [product]
    bias = _join(graph, [each.bias for each in projections], -1, nodes)
    if bias is not None:
        made.append(ir.node("Add", [product.outputs[0], bias], name=f"{product.name}_bias"))
    old = projections[0].output
    name = _joined_name([each.output.name or "" for each in projections])
    for node in made:
        result = node.outputs[0]
        result.name = name if node is made[-1] else f"{name}_product"
        result.type = old.type
        if old.shape is not None:
            result.shape = ir.Shape([*list(old.shape)[:-1], features])
    return [*nodes, *made]


def _split(graph: ir.Graph, packed: ir.Value, projections: Sequence[Projection]) -> ir.Node:
    """A node that gives query, key and value."""
    name = f"{packed.name}_split"
    sizes = ir.tensor(np.array([each.features for each in projections], np.int64))
    inputs = [packed, add_initializer(graph, f"{name}_sizes", sizes)]
    axis = ir.AttrInt64("axis", -1)
    return ir.Node("", "Split", inputs, [axis], num_outputs=len(projections), name=name)


def _join(
    graph: ir.Graph, values: Sequence[ir.Value | None], axis: int, nodes: list[ir.Node]
) -> ir.Value | None:
    """A constant that is those one after another, None where they are absent.

    Appends to `nodes` what makes it.
    """
    present = [value for value in values if value is not None]
    if not present:
        return None
    name = _joined_name([value.name or "" for value in present])
    old = [node for node in (value.producer() for value in present) if node is not None]
    if not old:
        tensors = [value.const_value for value in present if value.const_value is not None]
        return add_initializer(graph, name, join_tensors(tensors, axis))
    first = old[0]
    columns = zip(*(node.inputs for node in old), strict=True)
    joined = ir.Node(
        first.domain,
        first.op_type,
        [_join(graph, column, axis, nodes) for column in columns],
        first.attributes.values(),
        name=_joined_name([node.name or "" for node in old]),
        version=first.version,
    )
    joined.outputs[0].name, joined.outputs[0].type = name, first.outputs[0].type
    nodes.append(joined)
    return joined.outputs[0]


def _joined_name(names: Sequence[str]) -> str:
    """What names share, around what they do not: `a/q/x` and `a/k/x` give `a/q+k/x`."""
    parts = [re.split(r"(?<=[/.])|(?=[/.])", name) for name in names]
    first, shortest = parts[0], min(map(len, parts))
    before = 0
    while before < shortest and all(part[before] == first[before] for part in parts):
        before += 1
    after, room = 0, shortest - before
    while after < room and all(part[-1 - after] == first[-1 - after] for part in parts):
        after += 1
    middles = dict.fromkeys("".join(part[before : len(part) - after]) for part in parts)
    return "".join([*first[:before], "+".join(middles), *first[len(first) - after :]])
