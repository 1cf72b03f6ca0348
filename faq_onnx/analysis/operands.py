"""Looking at values of a graph: where constants come from, who reads what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "FLOAT_TYPES",
    "Constant",
    "all_nodes",
    "constant",
    "consumers",
    "dims",
    "is_op",
    "small_constant",
]

FLOAT_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}
_METADATA_READERS = ("Shape", "Size")  # they see the shape of a value, never its numbers
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclasses.dataclass(frozen=True)
class Constant:
    """An initializer as an operand sees it.

    Attributes:
        initializer: The stored value.
        transposed: It is read through an odd number of 2-D transpositions.
    """

    initializer: ir.Value
    transposed: bool

    @property
    def tensor(self) -> ir.TensorProtocol:
        """Stored tensor."""
        assert self.initializer.const_value is not None
        return self.initializer.const_value

    @property
    def name(self) -> str:
        """Name of the initializer."""
        assert self.initializer.name is not None
        return self.initializer.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as the operand sees it."""
        stored = tuple(self.tensor.shape.numpy())
        return stored[::-1] if self.transposed else stored


def is_op(node: ir.Node | None, *op_types: str, domain: str | None = None) -> bool:
    """Whether `node` is one of these operators; `domain` None takes ONNX's and Microsoft's."""
    if node is None or node.op_type not in op_types:
        return False
    if domain is not None:
        return node.domain == domain
    return node.domain in (*_STANDARD_DOMAINS, "com.microsoft")


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes in graph order, those of subgraphs where their If or Loop stands."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def constant(value: ir.Value | None) -> Constant | None:
    """The initializer behind `value`, seen through Identity and 2-D Transpose."""
    transposed = False
    while value is not None:
        if value.const_value is not None and value.is_initializer():
            return None if value.is_graph_input() else Constant(value, transposed)
        node = value.producer()
        if is_op(node, "Transpose", domain=""):
            assert node is not None
            perm = node.attributes.get_ints("perm", None)
            rank_two = perm is None and _is_matrix(node.inputs[0])
            if not rank_two and (perm is None or tuple(perm) != (1, 0)):
                return None
            transposed = not transposed
        elif not is_op(node, "Identity", domain=""):
            return None
        assert node is not None
        value = node.inputs[0]
    return None


def small_constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The numbers of a small constant (axes, shapes, scalars): initializer or Constant node."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > 64 else tensor.numpy()


def consumers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read the numbers of `value`, each once, in no particular order."""
    nodes = {id(use.node): use.node for use in value.uses()}
    return [node for node in nodes.values() if not is_op(node, *_METADATA_READERS, domain="")]


def dims(value: ir.Value) -> tuple[int | None, ...] | None:
    """Dimensions of a value, None for unknown ones; None where not even the rank is known."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None:
        return False
    if value.const_value is not None:
        return len(value.const_value.shape) == 2
    return value.shape is not None and len(value.shape) == 2
