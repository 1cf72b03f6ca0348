"""Shapes and element types of activations, by name of their dimensions, where exporters left none.

Only what follows from the inputs through operators that keep rows apart; never the sizes of heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from faq_onnx.analysis.operands import constant, dims, is_op, small_constant
from faq_onnx.runtime.feeds import cache_position

__all__ = ["BATCH", "LENGTH", "PAST", "TOTAL", "ActivationTypes", "Dim"]

Dim = str | int | None
BATCH, LENGTH, PAST, TOTAL = "batch", "length", "past", "total"
_PLAIN_INPUTS: Mapping[str, tuple[Dim, ...]] = {
    "input_ids": (BATCH, LENGTH),
    "position_ids": (BATCH, LENGTH),
    "attention_mask": (BATCH, TOTAL),
}
_ELEMENTWISE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Identity", "Cast"),
        *("Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Softplus", "QuickGelu", "FastGelu"),
    }
)
_NORMS = frozenset(
    {
        *("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"),
        *("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"),
    }
)


_MOVING = ("Transpose", "Reshape", "Concat", "Slice")


@dataclasses.dataclass(frozen=True)
class _Type:
    shape: tuple[Dim, ...] | None = None
    dtype: ir.DataType | None = None


class ActivationTypes:
    """What can be said about every value of a main graph, found in one walk through it."""

    def __init__(self, model: ir.Model) -> None:
        self._types: dict[ir.Value, _Type] = {}
        for value in model.graph.inputs:
            self._types[value] = _Type(_input_shape(value), value.dtype)
        for node in model.graph:
            found = self._infer(node)
            for index, value in enumerate(node.outputs):
                # Only the first output of a norm or linear layer has the inferred shape.
                kind = found if index == 0 else _Type()
                self._types[value] = _Type(kind.shape, value.dtype or kind.dtype)

    def shape(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """Dimensions: names of the module's constants, sizes, None for unknown ones."""
        return self._types.get(value, _Type()).shape

    def learn(self, value: ir.Value, shape: tuple[Dim, ...]) -> None:
        """Take in what a match says about a value."""
        self._types[value] = _Type(shape, self.dtype(value))

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type."""
        return self._type(value).dtype

    def sized(
        self, value: ir.Value, sizes: Mapping[str, int], *, unknown: int = 1
    ) -> tuple[int, ...] | None:
        """The shape in numbers; widths that nobody needs become `unknown`."""
        shape = self.shape(value)
        if shape is None:
            return None
        numbers = (sizes[dim] if isinstance(dim, str) else dim for dim in shape)
        return tuple(unknown if number is None else number for number in numbers)

    def _type(self, value: ir.Value | None) -> _Type:
        if value is None:
            return _Type()
        if value.const_value is not None:
            return _Type(None, value.const_value.dtype)
        return self._types.get(value, _Type(None, value.dtype))

    def _infer(self, node: ir.Node) -> _Type:
        types = [self._type(value) for value in node.inputs]
        first = types[0] if types else _Type()
        if is_op(node, "Gather", "GatherBlockQuantized"):
            table = types[0] if node.op_type == "Gather" else types[2]
            is_lookup = constant(node.inputs[0]) is not None or node.op_type != "Gather"
            rows = types[1].shape if is_lookup else None
            stored = constant(node.inputs[0]) if node.op_type == "Gather" else None
            width = stored.shape[-1] if stored is not None and len(stored.shape) == 2 else None
            return _Type(None if rows is None else (*rows, width), table.dtype)
        if is_op(node, "MatMul", "MatMulNBits"):
            weight = constant(node.inputs[1])
            rows = first.shape if weight is not None else None
            width = node.attributes.get_int("N", 0) or (weight.shape[-1] if weight else None)
            return _Type(None if rows is None else (*rows[:-1], width), first.dtype)
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            return _Type(None, None if tensor is None else tensor.dtype)
        if is_op(node, *_NORMS):
            return first
        if is_op(node, *_ELEMENTWISE):
            return _Type(_broadcast(types), _dtype_of(node, types))
        shape = _sliced(node, first.shape) if is_op(node, "Slice") else None
        return _Type(shape, first.dtype if is_op(node, *_MOVING) else None)


def _input_shape(value: ir.Value) -> tuple[Dim, ...] | None:
    name = value.name or ""
    if name in _PLAIN_INPUTS:
        return _PLAIN_INPUTS[name]
    widths = dims(value)
    if cache_position(name) is None or widths is None or len(widths) != 4:
        return None
    return (BATCH, widths[1], PAST, widths[3])


def _broadcast(types: list[_Type]) -> tuple[Dim, ...] | None:
    """The longest shape of the operands: scalars and vectors do not change it."""
    shapes = [kind.shape for kind in types if kind.shape is not None]
    return max(shapes, key=len, default=None)


def _sliced(node: ir.Node, shape: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    """Part of the last axis, as a projection of query, key and value is taken apart."""
    numbers = [None if value is None else small_constant(value) for value in node.inputs[1:]]
    if shape is None or not isinstance(shape[-1], int) or len(numbers) < 3:
        return None
    if any(number is None or number.size != 1 for number in numbers):
        return None
    start, stop, axis, *step = (int(number.item()) for number in numbers if number is not None)
    if axis not in (-1, len(shape) - 1):
        return None
    return (*shape[:-1], len(range(shape[-1])[slice(start, stop, *step)]))


def _dtype_of(node: ir.Node, types: list[_Type]) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0) or 0)
    return next((kind.dtype for kind in types if kind.dtype is not None), None)
