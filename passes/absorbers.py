"""Dividing the producer of an activation by a channel scale: norms and linear layers.

Only `fold_scales` uses it. No search and no checks of readers here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.plan import ScaleApplication
from faq_onnx.artifacts.sites import Absorber, LinearSite, ScaleGroup, WeightLayout
from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import find_initializer, transform_initializer
from faq_onnx.passes.nodes import ProducerIndex, add_initializer, initializer_above

__all__ = ["Fold", "Vector", "absorb_in_linear", "absorb_in_norm", "multiply", "row_scale"]

Vector = npt.NDArray[np.float32]

_NORM_SEARCH_DEPTH = 6  # value * rsqrt -> Cast -> Mul(gain) -> Add(bias) -> Cast -> Reshape


@dataclasses.dataclass(frozen=True)
class Fold:
    """One group, its scale [K] and the sites that it touches."""

    group: ScaleGroup
    application: ScaleApplication
    scale: Vector
    sites: tuple[LinearSite, ...]
    absorbing_site: LinearSite | None

    def columns(self, producers: ProducerIndex) -> dict[ir.Value, int]:
        """The readers' weights, each once, with the axis (from the end) of the input channels."""
        found: dict[ir.Value, int] = {}
        for site in self.sites:
            weight = initializer_above(producers.node(site.output, site.name), 1, site)
            found[weight] = -1 if site.layout is WeightLayout.N_K else -2
        return found


def multiply(model: ir.Model, weight: ir.Value, factor: Vector, axis: int) -> None:
    """Multiply a weight by a vector along `axis` (counted from the end), lazily."""
    assert weight.name is not None
    aligned = factor if axis == -1 else factor[:, None]
    transform_initializer(model, weight.name, lambda values: values * aligned)


def absorb_in_norm(model: ir.Model, fold: Fold, producers: ProducerIndex) -> None:
    """Gain (w + offset) / s - offset, bias / s."""
    absorber, scale = fold.group.absorber, fold.scale
    assert absorber is not None
    assert absorber.initializer is not None
    offset = np.float32(absorber.offset)
    gain = _own_parameter(fold, absorber.initializer, producers)
    transform_initializer(model, gain, lambda values: (values + offset) / scale - offset)
    if absorber.norm_bias is not None:
        bias = _own_parameter(fold, absorber.norm_bias, producers)
        transform_initializer(model, bias, lambda values: values / scale)


def _own_parameter(fold: Fold, name: str, producers: ProducerIndex) -> str:
    """The name of a norm parameter that only this group's norm reads, copied if need be.

    Raises:
        RewriteError: when the norm above the sites does not read it, or reads it through a node
            that other norms read too.
    """
    user, index = _norm_user(fold, name, producers)
    parameter = user.inputs[index]
    assert parameter is not None
    graph, tensor = parameter.graph, parameter.const_value
    if len(parameter.uses()) == 1:
        return name
    assert graph is not None
    assert tensor is not None
    copy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype),
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
    )
    value = add_initializer(graph, f"{name}_{fold.group.name}", copy)
    user.replace_input_with(index, value)
    assert value.name is not None
    return value.name


def _norm_user(fold: Fold, name: str, producers: ProducerIndex) -> tuple[ir.Node, int]:
    """The node above the group's sites that reads the initializer `name`, and at which input."""
    level = [producers.node(fold.sites[0].output, fold.sites[0].name).inputs[0]]
    for _ in range(_NORM_SEARCH_DEPTH):
        nodes = [node for value in level if value is not None and (node := value.producer())]
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and value.name == name:
                    _check_parameter_node(fold, node)
                    return node, index
        level = [value for node in nodes for value in node.inputs]
    raise RewriteError(
        f"{fold.group.name}: the norm above it does not read {name!r}; take the census again"
    )


def _check_parameter_node(fold: Fold, node: ir.Node) -> None:
    """A Cast or 1 + w of a gain must belong to one norm: a copy of the gain would not reach it."""
    is_constant = all(value is None or _is_constant(value) for value in node.inputs)
    if is_constant and len(node.outputs[0].uses()) > 1:
        raise RewriteError(
            f"{fold.group.name}: several nodes read its norm's gain through {node.name!r}; plan "
            "the application 'mul' or 'none'"
        )


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def absorb_in_linear(model: ir.Model, fold: Fold, producers: ProducerIndex) -> None:
    """Rows of the weight, and elements of the bias, divided by the scale."""
    site, absorber = fold.absorbing_site, fold.group.absorber
    assert site is not None
    assert absorber is not None
    inverse = (1 / row_scale(fold, absorber, site.out_features)).astype(np.float32)
    weight = initializer_above(producers.node(site.output, site.name), 1, site)
    multiply(model, weight, inverse, -2 if site.layout is WeightLayout.N_K else -1)
    if site.bias is not None:
        multiply(model, find_initializer(model, site.bias), inverse, -1)


def row_scale(fold: Fold, absorber: Absorber, out_features: int) -> Vector:
    """The divisor of each output channel [N] of a linear absorber, 1 where it keeps its size.

    Raises:
        RewriteError: when rows are missing, or input channels that come from one row differ.
    """
    name, scale = fold.group.name, fold.scale
    channels = np.arange(fold.group.in_features)
    rows = channels
    if absorber.head_dim is not None:
        heads = channels // absorber.head_dim // absorber.repeats
        rows = heads * absorber.head_dim + channels % absorber.head_dim
    rows = rows + absorber.row_start
    if rows.max() >= out_features:
        raise RewriteError(
            f"{name}: needs row {rows.max()} of {absorber.site}, which has {out_features}"
        )
    divisor = np.ones(out_features, np.float32)
    divisor[rows] = scale
    if not np.array_equal(divisor[rows], scale):
        raise RewriteError(
            f"{name}: query heads that share a key/value head have different scales, but read "
            f"the same rows of {absorber.site}; give the {absorber.repeats} heads one scale"
        )
    return divisor
