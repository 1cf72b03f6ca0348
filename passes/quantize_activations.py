"""Products of MatMulNBits between activations in 16-bit integers.

No numerics here: the steps arrive finished, see `faq_onnx.quant.activation_scales`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from faq_onnx.errors import RewriteError
from faq_onnx.passes.nodes import MICROSOFT_DOMAIN, add_initializer, import_microsoft_domain

__all__ = ["ProductSteps", "QuantizeActivationsPass"]

_OPERATOR = "MatMulNBits"


@dataclasses.dataclass(frozen=True)
class ProductSteps:
    """Steps of the integers in front of a product and behind it.

    Attributes:
        before: Of the activation, > 0.
        behind: Of the result, > 0.
    """

    before: float
    behind: float


@dataclasses.dataclass(frozen=True)
class QuantizeActivationsPass(ir.passes.InPlacePass):
    """Put QuantizeLinear and DequantizeLinear to int16 on both sides of MatMulNBits.

    1. Both are symmetric (zero point 0), with one step for the whole tensor.
    2. They are those of com.microsoft: in ONNX they have 16 bits from opset 21 on only, and a
       pass never raises the opset.
    3. Products that read one activation with one step share its pair.
    4. The result of a product keeps its name in front of the pair; readers get what is behind it,
       and a graph output stays the name of what the graph returns.
    5. A second run changes nothing.

    Attributes:
        steps: By name of the node; products without stay as they are.
    """

    steps: Mapping[str, ProductSteps] = dataclasses.field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in graph order."""
        pending = [node for node in model.graph if self._is_pending(node)]
        if pending:
            import_microsoft_domain(model)
        shared: dict[tuple[ir.Value, float], ir.Value] = {}
        for node in pending:
            assert node.name is not None
            steps, activation = self.steps[node.name], node.inputs[0]
            assert activation is not None
            key = (activation, steps.before)
            if key not in shared:
                shared[key] = _pair(node, activation, steps.before, ahead=True)
            node.replace_input_with(0, shared[key])
            _behind(model.graph, node, steps.behind)
        return ir.passes.PassResult(model, modified=bool(pending))

    def ensures(self, model: ir.Model) -> None:
        """Every product with steps has its pairs.

        Raises:
            RewriteError: for the first that has not.
        """
        for node in model.graph:
            if self._is_pending(node):
                raise RewriteError(f"{node.name}: was not rewritten; this is a bug in the pass")

    def _is_pending(self, node: ir.Node) -> bool:
        if (node.domain, node.op_type) != (MICROSOFT_DOMAIN, _OPERATOR):
            return False
        value = node.inputs[0]
        producer = None if value is None else value.producer()
        done = producer is not None and producer.op_type == "DequantizeLinear"
        return node.name in self.steps and not done


def _behind(graph: ir.Graph, node: ir.Node, step: float) -> None:
    """The pair behind a product, which its readers read from now on."""
    result = node.outputs[0]
    readers = tuple(result.uses())
    rounded = _pair(node, result, step, ahead=False)
    for reader, index in readers:
        reader.replace_input_with(index, rounded)
    for index, output in enumerate(graph.outputs):
        if output is result:
            result.name, rounded.name = f"{result.name}_product", result.name
            graph.outputs[index] = rounded


def _pair(node: ir.Node, value: ir.Value, step: float, *, ahead: bool) -> ir.Value:
    """A value rounded to multiples of `step`, by two nodes right before or behind `node`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    scale = add_initializer(graph, f"{value.name}_step", ir.tensor(np.array(step, np.float32)))
    zero = add_initializer(graph, f"{value.name}_zero", ir.tensor(np.array(0, np.int16)))
    down = _node("QuantizeLinear", value, scale, zero, ir.DataType.INT16)
    up = _node("DequantizeLinear", down.outputs[0], scale, zero, value.dtype)
    up.outputs[0].shape = down.outputs[0].shape = value.shape
    down.name, up.name = f"{value.name}_Q16", f"{value.name}_DQ16"
    down.outputs[0].name, up.outputs[0].name = f"{value.name}_int16", f"{value.name}_rounded"
    if ahead:
        graph.insert_before(node, [down, up])
    else:
        graph.insert_after(node, [down, up])
    return up.outputs[0]


def _node(
    kind: str, value: ir.Value, scale: ir.Value, zero: ir.Value, dtype: ir.DataType | None
) -> ir.Node:
    node = ir.node(kind, [value, scale, zero], domain=MICROSOFT_DOMAIN)
    node.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
    return node
