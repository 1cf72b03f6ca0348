"""Cut a decoder graph where its layers meet, or anywhere else, so that each part can run alone.

Cut at its layers, part 0 holds what comes before them (embedding, masks, rotary tables), parts
1..L the layers, part L + 1 everything behind them. A graph without layers is one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from faq_onnx.graph.names import node_layer_index

__all__ = ["Part", "cut_at", "cut_model", "extract_part"]

# What these operators return depends on shapes alone, not on the numbers.
_SHAPE_OPS = frozenset({"Shape", "Size"})


@dataclasses.dataclass(frozen=True)
class Part:
    """One stretch of a graph.

    Attributes:
        index: Order in which parts run; cut at layers, 0 is before them, i + 1 is layer i.
        inputs: Values from earlier parts, in graph order (graph inputs are not listed).
        outputs: Values that later parts read, or the model's logits. What depends on constants
            alone never crosses: each part computes its own.
        produces: Names of all values that nodes of this part compute.
        varying: Those of `inputs` and `outputs` whose numbers depend on the token ids.
    """

    index: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    produces: frozenset[str]
    varying: frozenset[str]


def cut_model(model: ir.Model, layer_of: Mapping[str, int], head: Iterable[str]) -> list[Part]:
    """Assign every node to a part and find what crosses between parts.

    Args:
        model: A topologically sorted graph.
        layer_of: Decoder layer by output value name, for nodes whose layer is known from analysis.
        head: Output value names of the nodes that belong behind the layers (the lm_head).
    """
    last = max(layer_of.values(), default=-1) + 2
    return _parts(model.graph, _layer_stages(model.graph, layer_of, frozenset(head), last))


def cut_at(model: ir.Model, stage_of: Mapping[str, int]) -> list[Part]:
    """Cut in front of chosen nodes.

    Args:
        model: A topologically sorted graph.
        stage_of: Part index >= 1 by output value name, in graph order; a node that is not named
            goes to the latest part that it reads from, so a part ends where the next one's named
            nodes get their inputs.
    """
    stage: dict[ir.Node, int] = {}
    for node in model.graph:
        at = max((stage[producer] for producer in _producers(node, model.graph)), default=0)
        wanted = (stage_of[o.name] for o in node.outputs if o.name and o.name in stage_of)
        stage[node] = max(at, *wanted, 0)
    return _parts(model.graph, stage)


def _parts(graph: ir.Graph, stage: Mapping[ir.Node, int]) -> list[Part]:
    """The parts that a stage for each node makes, and what crosses between them."""
    varying = _depending_on(graph, _token_inputs(graph), through_shapes=False)
    dynamic = _depending_on(graph, graph.inputs, through_shapes=True)
    readers = _readers(graph)
    logits = {value.name for value in _result_values(graph)}
    parts = []
    for index in sorted({*stage.values(), 0}):
        inputs: list[str] = []
        outputs: list[str] = []
        produces: list[str] = []
        for node in graph:
            for value in node.outputs:
                name = value.name
                if name is None or name not in dynamic:
                    continue
                used_at = [stage[reader] for reader in readers.get(value, ())]
                if stage[node] == index:
                    produces.append(name)
                if stage[node] < index and index in used_at:
                    inputs.append(name)
                crosses = any(use > index for use in used_at) or name in logits
                if stage[node] == index and crosses:
                    outputs.append(name)
        part = Part(
            index=index,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            produces=frozenset(produces),
            varying=varying & {*inputs, *outputs},
        )
        if part.outputs:
            parts.append(part)
    return parts


def extract_part(
    model: ir.Model,
    inputs: Mapping[str, tuple[ir.DataType, int]],
    outputs: Iterable[str],
) -> ir.Model:
    """A model of its own that computes `outputs`; weights stay where they are.

    Args:
        model: The whole model; not modified.
        inputs: Type and rank of the values that come from earlier parts.
        outputs: Value names.
    """
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    carried = [values[name] for name in inputs]
    wanted = [values[name] for name in outputs]
    cut = ir.convenience.extract(graph, [*carried, *graph.inputs], wanted)
    used = {value for node in cut.all_nodes() for value in node.inputs if value is not None}
    used.update(cut.outputs)
    for value in list(cut.inputs):
        if value not in used:
            cut.inputs.remove(value)
        elif value.name is not None and value.name in inputs:
            dtype, rank = inputs[value.name]
            value.dtype = dtype
            value.shape = ir.Shape([None] * rank)
    return ir.Model(cut, ir_version=model.ir_version, functions=list(model.functions.values()))


def _layer_stages(
    graph: ir.Graph, layer_of: Mapping[str, int], head: frozenset[str], last: int
) -> dict[ir.Node, int]:
    stage: dict[ir.Node, int] = {}
    for node in graph:
        at = max((stage[producer] for producer in _producers(node, graph)), default=0)
        known = next(
            (layer_of[o.name] for o in node.outputs if o.name and o.name in layer_of), None
        )
        if known is None:
            known = node_layer_index(node)
        if any(output.name in head for output in node.outputs):
            at = last
        elif known is not None and last > 1:
            at = max(at, min(known + 1, last))
        stage[node] = at
    return stage


def _result_values(graph: ir.Graph) -> list[ir.Value]:
    """The outputs that carry results: `logits` by name, else all but the key/value cache."""
    named = [value for value in graph.outputs if value.name == "logits"]
    if named:
        return named
    return [v for v in graph.outputs if not (v.name or "").startswith(("present", "past"))]


def _producers(node: ir.Node, graph: ir.Graph) -> list[ir.Node]:
    return [p for v in _all_inputs(node, graph) if (p := v.producer()) is not None]


def _all_inputs(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """Inputs of a node, with what the bodies of its attributes capture from `graph`."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        bodies: tuple[ir.Graph, ...] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = tuple(attribute.as_graphs())
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                values.extend(v for v in inner.inputs if v is not None and v.graph is graph)
    return values


def _readers(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        for value in _all_inputs(node, graph):
            readers.setdefault(value, []).append(node)
    return readers


def _token_inputs(graph: ir.Graph) -> list[ir.Value]:
    named = [value for value in graph.inputs if value.name in {"input_ids", "inputs_embeds"}]
    return named or list(graph.inputs)


def _depending_on(
    graph: ir.Graph, sources: Iterable[ir.Value], *, through_shapes: bool
) -> frozenset[str]:
    """Names of values computed from `sources`; a shape depends on no number of its operand."""
    marked = set(sources)
    for node in graph:
        if not through_shapes and node.op_type in _SHAPE_OPS:
            continue
        if any(value in marked for value in _all_inputs(node, graph)):
            marked.update(node.outputs)
    return frozenset(value.name for value in marked if value.name is not None)
