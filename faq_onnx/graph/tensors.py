"""Every place where a model holds a tensor, and reading one without keeping its pages resident."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["AttributeSlot", "InitializerSlot", "TensorSlot", "read_tensor", "tensor_slots"]


@dataclasses.dataclass(eq=False)
class InitializerSlot:
    """The tensor of an initializer, in the main graph or in a subgraph."""

    value: ir.Value

    @property
    def name(self) -> str:
        """Name of the initializer."""
        return self.value.name or "?"

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The tensor held now."""
        assert self.value.const_value is not None
        return self.value.const_value

    @tensor.setter
    def tensor(self, tensor: ir.TensorProtocol) -> None:
        """Hold another one; the value keeps its dtype and shape."""
        self.value.const_value = tensor


@dataclasses.dataclass(eq=False)
class AttributeSlot:
    """The tensor in an attribute, as Constant nodes have it."""

    node: ir.Node
    attribute: str

    @property
    def name(self) -> str:
        """Name of the node's first output."""
        return self.node.outputs[0].name or self.node.name or "?"

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The tensor held now.

        `as_tensor` would compare the value with the whole of `ir.TensorProtocol` on every call,
        which took half of the time to open a model; `tensor_slots` has looked at the type.
        """
        tensor: ir.TensorProtocol = self.node.attributes[self.attribute].value
        return tensor

    @tensor.setter
    def tensor(self, tensor: ir.TensorProtocol) -> None:
        """Hold another one, in a new attribute of the same name."""
        self.node.attributes[self.attribute] = ir.AttrTensor(self.attribute, tensor)


TensorSlot = InitializerSlot | AttributeSlot


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """All initializers and tensor attributes, subgraphs and functions included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield InitializerSlot(value)
        yield from _attribute_slots(graph)
    for function in model.functions.values():
        yield from _attribute_slots(function)


def _attribute_slots(graph: ir.Graph | ir.Function) -> Iterator[TensorSlot]:
    for node in graph:
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield AttributeSlot(node, name)


def read_tensor(tensor: ir.TensorProtocol) -> npt.NDArray[np.generic]:
    """The values of a tensor, float16 and bfloat16 widened to float32.

    Files are read, not mapped: mapped pages would count as resident until the tensor is released.
    The array may be a view of memory that the tensor owns; it must not be written to.
    """
    values = _read_external(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    if values.dtype in (np.float16, ml_dtypes.bfloat16):
        return values.astype(np.float32)
    return values


def _read_external(tensor: ir.ExternalTensor) -> npt.NDArray[np.generic]:
    if tensor.dtype.bitwidth < 8 or tensor.size == 0:
        return tensor.numpy()
    values: npt.NDArray[np.generic] = np.fromfile(
        tensor.path, dtype=tensor.dtype.numpy(), count=tensor.size, offset=tensor.offset or 0
    )
    return values.reshape(tensor.shape.numpy())
