"""Low-bit weights as lazy initializers: shapes now, bytes when the model is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import RewriteError
from faq_onnx.passes.nodes import add_initializer

__all__ = ["LowBitInitializers", "WeightReader", "add_low_bit"]

_Part = Callable[[QuantizedWeight], npt.NDArray[np.generic]]


class WeightReader:
    """Reads finished weights by name and keeps the last one.

    The three tensors of a weight are written one after the other, so each is made once.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight]) -> None:
        self._weights = weights
        self._last: tuple[str, QuantizedWeight] | None = None

    def read(self, name: str) -> QuantizedWeight:
        """The weight of that name."""
        if self._last is None or self._last[0] != name:
            self._last = None  # frees the old weight before the new one is made
            self._last = (name, self._weights[name])
        return self._last[1]


@dataclasses.dataclass(frozen=True)
class LowBitInitializers:
    """Inputs B, scales and zero_points of MatMulNBits: initializers, or what folds into one."""

    storage_bits: int
    packed: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None

    @property
    def inputs(self) -> list[ir.Value]:
        """In the operator's order, without the one that is not there."""
        optional = [] if self.zero_points is None else [self.zero_points]
        return [self.packed, self.scales, *optional]


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Shapes that a format gives to a weight [N, K]."""

    packed: tuple[int, ...]
    scales: tuple[int, ...]
    scale_unit: tuple[int, ...]
    zero_points: tuple[int, ...]

    @classmethod
    def of(cls, out_features: int, in_features: int, fmt: BlockFormat) -> _Shapes:
        """As MatMulNBits wants it; the last block of a row is padded."""
        blocks = -(-in_features // fmt.block_size)
        return cls(
            packed=(out_features, blocks, fmt.block_size * fmt.storage_bits // 8),
            scales=(out_features, blocks),
            scale_unit=(out_features, 1),
            zero_points=(out_features, -(-blocks * fmt.storage_bits // 8)),
        )

    def flat(self) -> _Shapes:
        """As GatherBlockQuantized wants it: the blocks of a row are one axis."""
        rows, blocks, blob = self.packed
        return dataclasses.replace(self, packed=(rows, blocks * blob))


def add_low_bit(
    weight: ir.Value, site: LinearSite | EmbeddingSite, fmt: BlockFormat, reader: WeightReader
) -> LowBitInitializers:
    """Add the initializers of a site's low-bit weight beside `weight`, in its graph."""
    if isinstance(site, LinearSite):
        shapes = _Shapes.of(site.out_features, site.in_features, fmt)
    else:
        shapes = _Shapes.of(site.rows, site.width, fmt).flat()
    scale_dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16"}[site.dtype]]
    graph = weight.graph
    assert graph is not None

    def add(suffix: str, part: _Part, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        tensor = _lazy(lambda: part(_checked(reader, site.name, fmt)), dtype, shape)
        return add_initializer(graph, f"{site.weight}_{suffix}", tensor)

    packed = add(
        f"Q{fmt.storage_bits}",
        lambda w: w.packed.reshape(shapes.packed),
        ir.DataType.UINT8,
        shapes.packed,
    )
    if fmt.block_scales == "float":
        scales = add("scales", lambda w: w.scales, scale_dtype, shapes.scales)
    else:
        signed = fmt.symmetric or fmt.block_scales == "lpbq"
        dtype = ir.DataType.INT8 if signed else ir.DataType.UINT8
        multiples = add("scale_multiples", lambda w: w.scales, dtype, shapes.scales)
        unit = add("scale_unit", _scale_unit, scale_dtype, shapes.scale_unit)
        scales = _multiply_out(graph, multiples, unit, f"{site.weight}_scales")
    zero_points = None
    if not fmt.symmetric:
        zero_points = add("zero_points", _zero_points, ir.DataType.UINT8, shapes.zero_points)
    return LowBitInitializers(fmt.storage_bits, packed, scales, zero_points)


def _multiply_out(graph: ir.Graph, multiples: ir.Value, unit: ir.Value, name: str) -> ir.Value:
    """Nodes at the beginning of the graph that give scales in the unit's dtype.

    In float32: onnxruntime folds what it has a CPU kernel for, and there is none for float16.
    """
    assert unit.dtype is not None
    whole = ir.node("Cast", [multiples], {"to": ir.DataType.FLOAT}, name=f"{name}_float")
    nodes, factor = [whole], unit
    if unit.dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [unit], {"to": ir.DataType.FLOAT}, name=f"{name}_unit_float"))
        factor = nodes[-1].outputs[0]
    nodes.append(ir.node("Mul", [whole.outputs[0], factor], name=f"{name}_product"))
    if unit.dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": unit.dtype}, name=name))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].dtype = ir.DataType.FLOAT
    scales = nodes[-1].outputs[0]
    scales.name, scales.dtype, scales.shape = name, unit.dtype, multiples.shape
    if len(graph):
        graph.insert_before(graph.node(0), nodes)
    else:
        graph.extend(nodes)
    return scales


def _lazy(
    read: Callable[[], npt.NDArray[np.generic]], dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.LazyTensor:
    """A tensor that reads its array, and checks it, whenever it is needed."""

    def evaluate() -> ir.TensorProtocol:
        array = read()
        if array.shape != shape or array.dtype != dtype.numpy():
            raise RewriteError(
                f"a quantized weight is {array.dtype}{list(array.shape)}, planned was "
                f"{dtype.numpy()}{list(shape)}"
            )
        return ir.Tensor(np.ascontiguousarray(array), dtype=dtype)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape))


def _checked(reader: WeightReader, name: str, fmt: BlockFormat) -> QuantizedWeight:
    """The weight, if it has the planned format."""
    weight = reader.read(name)
    if weight.format != fmt:
        raise RewriteError(f"{name}: quantized as {weight.format!r}, planned was {fmt!r}")
    return weight


def _scale_unit(weight: QuantizedWeight) -> npt.NDArray[np.floating]:
    """Units of a weight whose scales are multiples."""
    assert weight.scale_unit is not None
    return weight.scale_unit


def _zero_points(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """Zero points of an asymmetric weight."""
    assert weight.zero_points is not None
    return weight.zero_points
