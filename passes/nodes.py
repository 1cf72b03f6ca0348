"""Finding and retiring nodes and weights in a graph: what every pass of this room needs.

No decisions and no numerics here; a pass calls these between its own checks and edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from faq_onnx.artifacts.sites import LinearSite
from faq_onnx.errors import RewriteError

__all__ = [
    "MICROSOFT_DOMAIN",
    "ProducerIndex",
    "add_initializer",
    "become",
    "import_microsoft_domain",
    "initializer_above",
    "low_bit_node_name",
    "path_to_initializer",
    "readers",
    "remove_dead",
    "take_place",
]

MICROSOFT_DOMAIN = "com.microsoft"

_CARRIERS = ("Transpose", "Identity")
"""What may stand between an initializer and the node that uses it as a weight."""


class ProducerIndex:
    """The nodes of a model, subgraphs included, by the name of a value that they produce."""

    def __init__(self, model: ir.Model) -> None:
        self._nodes = {
            output.name: node for node in model.graph.all_nodes() for output in node.outputs
        }

    def node(self, output: str, place: str) -> ir.Node:
        """The node that produces `output`.

        Raises:
            RewriteError: naming `place`, when there is none.
        """
        node = self._nodes.get(output)
        if node is None:
            raise RewriteError(
                f"{place}: no node produces the value {output!r}; the census or plan belongs to "
                "another model, take the census again"
            )
        return node


def path_to_initializer(node: ir.Node, index: int) -> tuple[ir.Value, ...]:
    """Values from input `index` of `node` up to the initializer, which is the last.

    Raises:
        RewriteError: when the input does not come from an initializer.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    path: list[ir.Value] = []
    while value is not None:
        path.append(value)
        if value.is_initializer():
            return tuple(path)
        producer = value.producer()
        if producer is None or producer.op_type not in _CARRIERS:
            break
        value = producer.inputs[0]
    raise RewriteError(
        f"{node.name or node.op_type}: input {index} does not come from an initializer (looked "
        f"through {', '.join(_CARRIERS)}); fold constants or leave the node float"
    )


def initializer_above(node: ir.Node, index: int, site: LinearSite) -> ir.Value:
    """The weight initializer of a site's node.

    Raises:
        RewriteError: when it is another one than the census says.
    """
    initializer = path_to_initializer(node, index)[-1]
    if initializer.name != site.weight:
        raise RewriteError(
            f"{site.name}: reads the weight {initializer.name!r}, the census says "
            f"{site.weight!r}; take the census again"
        )
    return initializer


def readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that compute with a value: those that only carry it are looked through."""
    for node in value.consumers():
        if node.op_type in _CARRIERS and node.inputs[0] is value:
            yield from readers(node.outputs[0])
        else:
            yield node


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor under `name`, or `name_1`, ... where that is taken."""
    unique, count = name, 0
    taken = {value.name for value in graph.inputs} | graph.initializers.keys()
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    tensor.name = unique
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def become(node: ir.Node, domain: str, op_type: str, inputs: list[ir.Value | None]) -> None:
    """Change operator and inputs; the output values, and so all names downstream, stay."""
    node.domain, node.op_type, node.version = domain, op_type, None
    node.attributes.clear()
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def import_microsoft_domain(model: ir.Model) -> None:
    """Import com.microsoft version 1, the only version that there is."""
    model.opset_imports.setdefault(MICROSOFT_DOMAIN, 1)


def low_bit_node_name(site: str, storage_bits: int) -> str:
    """Name of the low-bit node of a site or embedding: as onnxruntime's own tool has it."""
    return f"{site}_Q{storage_bits}"


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Readers, graph output, type and name of `old` go to `new`."""
    name = old.name
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}_replaced"
    new.name = name


def remove_dead(values: Iterable[ir.Value]) -> None:
    """Remove initializers, and carriers above weights, that nobody reads any more."""
    for value in values:
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        graph, producer = value.graph, value.producer()
        if producer is not None and producer.graph is not None:
            above = [each for each in producer.inputs if each is not None]
            producer.graph.remove(producer, safe=True)
            remove_dead(above)
        elif graph is not None and value.is_initializer():
            assert value.name is not None
            del graph.initializers[value.name]
