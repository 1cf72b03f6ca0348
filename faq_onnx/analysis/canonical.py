"""Bring a freshly loaded model into the form that the rest of the package expects."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["canonicalise"]

_MIN_LIFTED_ELEMENTS = 16  # smaller constants are axes and shapes, read where they stand


def canonicalise(model: ir.Model) -> ir.Model:
    """Make every weight an initializer of the main graph; the function of the model stays.

    1. Model-local functions are inlined; initializers are no longer overridable inputs.
    2. Constant nodes, and initializers of If and Loop bodies, become main-graph initializers.
    3. With subgraphs, value and node names become unique in the whole model.
    4. A vector used by several nodes (exporters merge equal norm gains) gets a copy per node,
       so that each can be scaled alone.

    Returns:
        The same object.
    """
    if model.functions:
        common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(size_limit=_MIN_LIFTED_ELEMENTS)(model)
    if sum(1 for _ in model.graphs()) > 1:
        common.NameFixPass()(model)
        _separate_branches(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
    _unshare_vectors(model)
    return model


def _separate_branches(model: ir.Model) -> None:
    """The two bodies of an If may use the same names; a site is found by its output's name."""
    taken: set[str | None] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            name, number = value.name, 0
            while value.name in taken:
                number += 1
                value.name = f"{name}_{number}"
            if value.name:
                taken.add(value.name)


def _unshare_vectors(model: ir.Model) -> None:
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or value.is_graph_output():
            continue
        if tensor.size < _MIN_LIFTED_ELEMENTS or tensor.size != tensor.shape[-1]:
            continue
        users = list({id(use.node): use.node for use in value.uses()}.values())
        for number, node in enumerate(users[1:], start=1):
            copy = _copy_initializer(model.graph, value, number)
            for index, operand in enumerate(node.inputs):
                if operand is value:
                    node.replace_input_with(index, copy)


def _copy_initializer(graph: ir.Graph, value: ir.Value, number: int) -> ir.Value:
    name = f"{value.name}_copy_{number}"
    while name in graph.initializers:
        name += "_"
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    return copy
