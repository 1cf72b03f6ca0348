"""Add graph outputs that reduce activations to statistics while the model runs."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faq_onnx.errors import RewriteError

__all__ = ["ActivationRequest", "InsertActivationStatsPass"]

_AXES_AS_INPUT_OPSET = 13  # ReduceSum takes its axes as an input from here on


@dataclasses.dataclass(frozen=True)
class ActivationRequest:
    """Statistics wanted of one activation value x [..., K], over all its T rows.

    Attributes:
        value: Name of the value.
        features: K.
        sum_abs: Add output `sum_abs_name`: float32 [K], sum over rows of |x|.
        gram: Add output `gram_name`: float32 [K, K], x^T x.
    """

    value: str
    features: int
    sum_abs: bool = True
    gram: bool = False

    @property
    def sum_abs_name(self) -> str:
        """Name of the added output."""
        return f"{self.value}/faq_sum_abs"

    @property
    def gram_name(self) -> str:
        """Name of the added output."""
        return f"{self.value}/faq_gram"


@dataclasses.dataclass(frozen=True)
class InsertActivationStatsPass(ir.passes.InPlacePass):
    """Append reductions of activations as graph outputs.

    1. x is cast to float32 and flattened to [T, K]: the reductions are float32 per run, the
       caller accumulates over runs in float64.
    2. Nothing that was there is changed; a statistic that is already an output is not added again.

    Attributes:
        requests: What to reduce.
    """

    requests: tuple[ActivationRequest, ...] = dataclasses.field(default=(), repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the outputs."""
        values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        present = {value.name for value in model.graph.outputs}
        modified = False
        for request in self.requests:
            value = values.get(request.value)
            if value is None:
                msg = f"no value named {request.value!r} to collect statistics from"
                raise RewriteError(msg)
            wanted = {
                request.sum_abs_name: request.sum_abs,
                request.gram_name: request.gram,
            }
            missing = [name for name, want in wanted.items() if want and name not in present]
            if missing:
                _insert(model.graph, value, request, missing)
                modified = True
        return ir.passes.PassResult(model, modified)


def _insert(
    graph: ir.Graph, value: ir.Value, request: ActivationRequest, missing: list[str]
) -> None:
    prefix = f"{request.value}/faq"
    shape = _constant(graph, f"{prefix}_rows", [-1, request.features])
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{prefix}_cast")
    rows = ir.node("Reshape", [cast.outputs[0], shape], name=f"{prefix}_reshape")
    graph.extend([cast, rows])
    flat = rows.outputs[0]
    if request.sum_abs_name in missing:
        magnitude = ir.node("Abs", [flat], name=f"{prefix}_abs")
        graph.append(magnitude)
        total = _reduce_sum(graph, magnitude.outputs[0], prefix)
        _add_output(graph, total, request.sum_abs_name, [request.features])
    if request.gram_name in missing:
        gram = ir.node("Gemm", [flat, flat], {"transA": 1}, name=f"{prefix}_gemm")
        graph.append(gram)
        _add_output(graph, gram, request.gram_name, [request.features] * 2)


def _reduce_sum(graph: ir.Graph, value: ir.Value, prefix: str) -> ir.Node:
    attributes: dict[str, int | list[int]] = {"keepdims": 0}
    inputs = [value]
    if graph.opset_imports.get("", _AXES_AS_INPUT_OPSET) < _AXES_AS_INPUT_OPSET:
        attributes["axes"] = [0]
    else:
        inputs.append(_constant(graph, f"{prefix}_axis", [0]))
    node = ir.node("ReduceSum", inputs, attributes, name=f"{prefix}_sum")
    graph.append(node)
    return node


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    existing = graph.initializers.get(name)
    if existing is not None:
        return existing
    tensor = ir.tensor(numbers, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64)
    )
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _add_output(graph: ir.Graph, node: ir.Node, name: str, shape: list[int]) -> None:
    output = node.outputs[0]
    output.name = name
    output.shape = ir.Shape(shape)
    output.dtype = ir.DataType.FLOAT
    graph.outputs.append(output)
