"""Find linear layers, and say of every other large constant why it stays as it is."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from faq_onnx.analysis.names import node_texts, role_from_text
from faq_onnx.analysis.operands import (
    FLOAT_TYPES,
    Constant,
    all_nodes,
    constant,
    consumers,
    dims,
    is_op,
)
from faq_onnx.artifacts.sites import LinearRole, LinearSite, SkippedWeight, WeightLayout
from faq_onnx.graph.names import layer_from_text

__all__ = ["FoundSite", "find_linear_sites", "find_skipped"]

MIN_IN_FEATURES = 16  # the smallest block that MatMulNBits stores
MIN_WEIGHT_ELEMENTS = 1024  # smaller constants are tables and shapes, nobody misses them


@dataclasses.dataclass(frozen=True)
class FoundSite:
    """A site and the graph objects behind it."""

    site: LinearSite
    node: ir.Node
    input: ir.Value
    weight: ir.Value

    @property
    def output(self) -> ir.Value:
        """The value that the node produces."""
        return self.node.outputs[0]


def find_linear_sites(model: ir.Model) -> list[FoundSite]:
    """All MatMul and Gemm nodes that are y = x W^T with a constant W, in graph order."""
    found: list[FoundSite] = []
    names: set[str] = set()
    for node in all_nodes(model):
        weight = _weight(node)
        if weight is None or _obstacle(node, weight):
            continue
        site = _make_site(model, node, weight, names)
        names.add(site.name)
        assert node.inputs[0] is not None
        found.append(FoundSite(site, node, node.inputs[0], weight.initializer))
    return found


def find_skipped(model: ir.Model, handled: set[str]) -> list[SkippedWeight]:
    """Large constants that are read by other nodes than those named in `handled`.

    Args:
        model: The graph.
        handled: Outputs of nodes that are linear sites or embeddings.
    """
    skipped: list[SkippedWeight] = []
    for node in all_nodes(model):
        if node.outputs[0].name in handled or is_op(node, "Identity", "Transpose", domain=""):
            continue
        for index, operand in enumerate(node.inputs):
            weight = constant(operand)
            if weight is None or len(weight.shape) < 2:
                continue
            if math.prod(weight.shape) < MIN_WEIGHT_ELEMENTS:
                continue
            if weight.tensor.dtype in FLOAT_TYPES or index == 1:
                skipped.append(_skipped(node, index, weight))
    return skipped


def _weight(node: ir.Node) -> Constant | None:
    if not is_op(node, "MatMul", "Gemm", domain=""):
        return None
    return constant(node.inputs[1])


def _obstacle(node: ir.Node, weight: Constant) -> str:
    """Why this MatMul or Gemm is no linear site; "" if it is one."""
    if constant(node.inputs[0]) is not None:
        return "both operands are constant"
    if weight.tensor.dtype not in FLOAT_TYPES:
        return f"weight type {weight.tensor.dtype.name}, only float32, float16 and bfloat16"
    if node.op_type == "Gemm":
        return _gemm_obstacle(node, weight)
    return _rank_obstacle(node, weight) or _size_obstacle(weight.shape[-2])


def _rank_obstacle(node: ir.Node, weight: Constant) -> str:
    shape = weight.shape
    if len(shape) == 3 and shape[0] != 1:
        return f"a batch of {shape[0]} different weights, MatMulNBits holds one"
    if len(shape) not in (2, 3) or (len(shape) == 3 and weight.transposed):
        return f"weight of rank {len(shape)}, MatMulNBits holds matrices"
    rank = dims(node.inputs[0]) if node.inputs[0] is not None else None
    if rank is not None and len(rank) < len(shape):
        return f"input of rank {len(rank)} with a weight of rank {len(shape)}"
    return ""


def _gemm_obstacle(node: ir.Node, weight: Constant) -> str:
    attributes = node.attributes
    if attributes.get_int("transA", 0):
        return "Gemm with transA=1"
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm with alpha or beta other than 1"
    in_features, out_features = _features(node, weight)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        addend = constant(node.inputs[2])
        if addend is None or addend.shape[-1:] != (out_features,) or addend.transposed:
            return "Gemm whose C is not a constant vector [N]"
        if math.prod(addend.shape) != out_features:
            return "Gemm whose C is not a constant vector [N]"
    return _size_obstacle(in_features)


def _size_obstacle(in_features: int) -> str:
    if in_features < MIN_IN_FEATURES:
        return f"K={in_features}, smaller than the smallest block ({MIN_IN_FEATURES})"
    return ""


def _features(node: ir.Node, weight: Constant) -> tuple[int, int]:
    in_features, out_features = weight.shape[-2:]
    if _transposes_b(node):
        return out_features, in_features
    return in_features, out_features


def _transposes_b(node: ir.Node) -> bool:
    transposes: int | None = node.attributes.get_int("transB", 0)
    return node.op_type == "Gemm" and transposes == 1


def _make_site(model: ir.Model, node: ir.Node, weight: Constant, taken: set[str]) -> LinearSite:
    output = node.outputs[0].name
    assert output is not None
    assert node.inputs[0] is not None
    in_features, out_features = _features(node, weight)
    texts = list(node_texts(node, weight.name))
    roles = (role_from_text(text) for text in texts)
    layers = (layer_from_text(text) for text in texts)
    name = node.name or output
    return LinearSite(
        name=output if name in taken else name,
        output=output,
        op_type=node.op_type,
        input=node.inputs[0].name or "",
        weight=weight.name,
        layout=_layout(node, weight),
        role=next((role for role in roles if role is not None), LinearRole.OTHER),
        layer_index=next((layer for layer in layers if layer is not None), None),
        in_features=in_features,
        out_features=out_features,
        dtype=FLOAT_TYPES[weight.tensor.dtype],
        bias=_bias(node, out_features),
        in_subgraph=node.graph is not model.graph,
    )


def _layout(node: ir.Node, weight: Constant) -> WeightLayout:
    if len(weight.shape) == 3:
        return WeightLayout.ONE_K_N
    return WeightLayout.N_K if _transposes_b(node) != weight.transposed else WeightLayout.K_N


def _bias(node: ir.Node, out_features: int) -> str | None:
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        addend = constant(node.inputs[2])
        return None if addend is None else addend.name
    readers = consumers(node.outputs[0])
    if len(readers) != 1 or not is_op(readers[0], "Add", domain=""):
        return None
    for operand in readers[0].inputs:
        addend = constant(operand)
        if addend is not None and addend.shape == (out_features,):
            return addend.name
    return None


def _skipped(node: ir.Node, index: int, weight: Constant) -> SkippedWeight:
    return SkippedWeight(
        node=node.name or node.outputs[0].name or "",
        op_type=node.op_type,
        weight=weight.name,
        shape=weight.shape,
        reason=_skip_reason(node, index, weight),
    )


def _skip_reason(node: ir.Node, index: int, weight: Constant) -> str:
    if is_op(node, "MatMul", "Gemm", domain="") and index == 0:
        return "the constant is the left operand; MatMulNBits takes weights on the right"
    if is_op(node, "MatMul", "Gemm", domain="") and index == 1:
        return _obstacle(node, weight)
    if is_op(node, "Conv", "ConvTranspose", domain=""):
        return "no low-bit convolution kernel exists in onnxruntime"
    if is_op(node, "Gather", domain="") and index == 0:
        return "the table is not indexed by token ids along axis 0"
    if is_op(node, "Cast", domain=""):
        return "the weight is cast before use; export the model in one precision"
    return f"no low-bit form of operator {node.op_type} exists"
