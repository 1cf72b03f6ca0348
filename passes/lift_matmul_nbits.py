"""MatMulNBits over a matrix becomes MatMulNBits over a batch of one matrix.

Qualcomm's compiler takes activations of rank 3 only; exporters that flatten batch and sequence
write Gemm, and so a matrix.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faq_onnx.passes.nodes import MICROSOFT_DOMAIN, add_initializer, become

__all__ = ["LiftMatMulNBitsPass"]

_OPERATOR = "MatMulNBits"
_INTEGERS = ("K", "N", "accuracy_level", "bits", "block_size")


@dataclasses.dataclass(frozen=True)
class LiftMatMulNBitsPass(ir.passes.InPlacePass):
    """Give MatMulNBits an activation [1, rows, K] where it has [rows, K].

    1. A Reshape in front, and one behind, whose output keeps its name, type and shape.
    2. The rank is that of the value, or that to which a Reshape or Flatten in front brings it; a
       node whose rank nobody knows stays.
    3. A second run changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lift every such node."""
        found = [
            node
            for node in model.graph.all_nodes()
            if node.domain == MICROSOFT_DOMAIN
            and node.op_type == _OPERATOR
            and _rank(node.inputs[0]) == 2
        ]
        for node in found:
            _lift(node)
        return ir.passes.PassResult(model, modified=bool(found))


def _rank(value: ir.Value | None) -> int | None:
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Flatten":
        return 2
    target = node.inputs[1] if node.op_type == "Reshape" else None
    tensor = None if target is None else ir.convenience.get_const_tensor(target)
    return None if tensor is None else int(tensor.size)


def _lift(node: ir.Node) -> None:
    graph, result, matrix = node.graph, node.outputs[0], node.inputs[0]
    assert isinstance(graph, ir.Graph)
    width, features = (node.attributes[name].as_int() for name in ("K", "N"))

    def shape(suffix: str, *sizes: int) -> ir.Value:
        tensor = ir.tensor(np.array(sizes, np.int64))
        return add_initializer(graph, f"{result.name}_{suffix}", tensor)

    before = ir.node("Reshape", [matrix, shape("batch", 1, -1, width)])
    given = {n: node.attributes[n].as_int() for n in _INTEGERS if n in node.attributes}
    product = ir.node(
        _OPERATOR,
        [before.outputs[0], *node.inputs[1:]],
        given,
        domain=MICROSOFT_DOMAIN,
        name=node.name,
    )
    for each, suffix in ((before, "lifted"), (product, "product")):
        each.outputs[0].name = f"{result.name}_{suffix}"
        each.outputs[0].type = result.type
    before.name = f"{node.name}_lift"
    graph.insert_before(node, [before, product])
    become(node, "", "Reshape", [product.outputs[0], shape("matrix", -1, features)])
    node.name = f"{product.name}_lower"
