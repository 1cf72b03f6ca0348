"""Compute single values of a graph in numpy: masks, positions, shapes, one layer's attention.

For looking at what a few nodes compute, on small arrays, where onnxruntime may not be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

__all__ = ["LARGEST_CONSTANT", "CannotEvaluateError", "evaluate"]

Array = npt.NDArray[Any]
ShapeOf = Callable[[ir.Value], tuple[int, ...] | None]

LARGEST_CONSTANT = 1 << 20  # elements; what reads more is a layer, not a mask
_SHAPE_ONLY = "shape of "
_SHOWN = 200  # characters of what an operator says


class CannotEvaluateError(ValueError):
    """The values depend on something that was not fed, or on an operator that cannot run."""


def evaluate(
    model: ir.Model,
    targets: Sequence[ir.Value],
    feeds: Mapping[str, Array],
    shape_of: ShapeOf = lambda _value: None,
) -> list[Array]:
    """Values of `targets`.

    Args:
        model: Its main graph holds the targets.
        targets: Values to compute.
        feeds: By value name; the walk back from the targets stops there.
        shape_of: Shapes of values of which only the shape is read, asked before their nodes are
            followed; None where unknown.

    Raises:
        CannotEvaluateError: Says what is missing.
    """
    part = _Part(feeds, shape_of)
    for target in targets:
        part.need(target)
    names = [str(target.name) for target in targets]
    session = part.session(model, names)
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(array) for array in session.run(names, part.given)]
    except Exception as error:  # whatever an operator raises on what it does not expect
        msg = f"{', '.join(names)} cannot be computed in numpy: {str(error)[:_SHOWN]}"
        raise CannotEvaluateError(msg) from error


class _Part:
    """The nodes behind some values, as a model of their own."""

    def __init__(self, feeds: Mapping[str, Array], shape_of: ShapeOf) -> None:
        self._feeds, self._shape_of = feeds, shape_of
        self._nodes: dict[ir.Node, onnx.NodeProto] = {}
        self._constants: dict[str, onnx.TensorProto] = {}
        self.given: dict[str, Array] = {}

    def need(self, target: ir.Value) -> None:
        """Collect what `target` is computed from."""
        pending = [target]
        while pending:
            node = self._leaf(pending.pop())
            if node is None or node in self._nodes:
                continue
            proto = ir.serde.serialize_node(node)
            self._nodes[node] = proto
            if node.op_type in {"Shape", "Size"} and self._gives_shape(node, proto):
                continue
            pending += [value for value in node.inputs if value is not None]

    def session(self, model: ir.Model, outputs: Sequence[str]) -> Any:
        """The collected nodes in numpy."""
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import

        proto = onnx.ModelProto(ir_version=10)
        for domain, version in model.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        order = {node: index for index, node in enumerate(model.graph)}
        graph = proto.graph
        graph.name = "part"
        graph.node.extend(self._nodes[node] for node in sorted(self._nodes, key=order.__getitem__))
        graph.initializer.extend(self._constants.values())
        for name in self.given:
            graph.input.add(name=name)
        for name in outputs:
            graph.output.add(name=name)
        return ReferenceEvaluator(proto)

    def _leaf(self, value: ir.Value) -> ir.Node | None:
        """The node to follow; None where the value is known."""
        name = str(value.name)
        if name in self._feeds:
            self.given[name] = self._feeds[name]
            return None
        node = value.producer()
        if node is not None:
            return node
        tensor = value.const_value
        if tensor is None:
            raise CannotEvaluateError(f"it depends on the input {name!r}")
        if tensor.size > LARGEST_CONSTANT:
            raise CannotEvaluateError(f"it depends on the numbers of {name!r}")
        # A copy, because a tensor in a file would be written as a reference to it.
        copy = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        self._constants[name] = ir.serde.serialize_tensor(copy)
        return None

    def _gives_shape(self, node: ir.Node, proto: onnx.NodeProto) -> bool:
        """Feed an array of the known shape, and no memory, in place of the value."""
        value = node.inputs[0]
        assert value is not None
        name = str(value.name)
        fed = self._feeds.get(name)
        shape = self._shape_of(value) if fed is None else fed.shape
        if shape is None:
            return False
        proto.input[0] = f"{_SHAPE_ONLY}{name}"
        self.given[proto.input[0]] = np.broadcast_to(np.float32(0), shape)
        return True
