"""Norm gains that can absorb a channel scale."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faq_onnx.analysis.operands import Constant, constant, consumers, is_op, small_constant
from faq_onnx.analysis.paths import NoPath, describe
from faq_onnx.artifacts.sites import Absorber, AbsorberKind

__all__ = ["Gain", "find_gain", "norm_absorber"]

# Operators with a gain as an operand: position of the gain, and of a bias added after it.
_NORMS: dict[str, tuple[int, int | None]] = {
    "SimplifiedLayerNormalization": (1, None),
    "RMSNormalization": (1, None),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2, None),
    "SkipLayerNormalization": (2, 3),
}
_NORMALISED_OUTPUT = 0  # Skip norms also give the sum, which must not change


def norm_absorber(root: ir.Value, in_features: int) -> Absorber | NoPath:
    """The gain that makes `root`, as an absorber.

    Args:
        root: The activation, not a view of it; the caller has checked who reads it.
        in_features: Channels K that the gain must have.
    """
    node = root.producer()
    if node is None:
        return NoPath(f"{root.name!r} is {describe(None)}, nothing before it can be scaled")
    bias: Constant | None = None
    if is_op(node, "Add", domain=""):
        bias = _vector_operand(node, in_features)
        scaled = _other_operand(node, bias)
        producer = None if scaled is None else scaled.producer()
        if bias is None or scaled is None or producer is None or len(consumers(scaled)) > 1:
            return NoPath(f"{describe(node)} makes {root.name!r}: no gain to scale")
        node = producer
    if is_op(node, "Mul", domain=""):
        return _from_mul(node, in_features, bias)
    if is_op(node, *_NORMS) and bias is None:
        return _from_operator(node, root, in_features)
    return NoPath(f"{describe(node)} makes {root.name!r}: no gain to scale")


@dataclasses.dataclass(frozen=True)
class Gain:
    """A norm multiplies its channels by `initializer + offset`."""

    initializer: Constant
    offset: float


def _from_mul(node: ir.Node, in_features: int, bias: Constant | None) -> Absorber | NoPath:
    for operand in node.inputs:
        gain = find_gain(operand, node)
        if isinstance(gain, Gain) and _is_vector(gain.initializer, in_features):
            return _absorber(gain, bias, node)
    return NoPath(f"{describe(node)} has no constant gain of {in_features} channels")


def _from_operator(node: ir.Node, root: ir.Value, in_features: int) -> Absorber | NoPath:
    if root is not node.outputs[_NORMALISED_OUTPUT]:
        return NoPath(f"{root.name!r} is the residual sum of {describe(node)}, not its norm")
    if node.attributes.get_int("axis", -1) != -1:
        return NoPath(f"{describe(node)} does not normalise the last axis alone")
    gain_at, bias_at = _NORMS[node.op_type]
    gain = find_gain(node.inputs[gain_at], node)
    if isinstance(gain, NoPath):
        return gain
    bias = None
    if bias_at is not None and len(node.inputs) > bias_at and node.inputs[bias_at] is not None:
        bias = constant(node.inputs[bias_at])
        if bias is None:
            return NoPath(f"{describe(node)} adds a bias that is not constant")
    if not _is_vector(gain.initializer, in_features):
        return NoPath(f"{describe(node)} has no gain of {in_features} channels")
    return _absorber(gain, bias, node)


def _absorber(gain: Gain, bias: Constant | None, node: ir.Node) -> Absorber | NoPath:
    for vector in (gain.initializer, *([bias] if bias is not None else [])):
        readers = consumers(vector.initializer)
        if len(readers) != 1:
            return NoPath(f"{vector.name!r} of {describe(node)} is used by other nodes too")
    return Absorber(
        kind=AbsorberKind.NORM,
        initializer=gain.initializer.name,
        offset=gain.offset,
        norm_bias=None if bias is None else bias.name,
    )


def find_gain(value: ir.Value | None, reader: ir.Node) -> Gain | NoPath:
    """A gain vector, directly or as `w + 1` computed in the graph (Gemma)."""
    offset = 0.0
    while value is not None:
        direct = constant(value)
        if direct is not None:
            return Gain(direct, offset)
        node = value.producer()
        if node is None or len(consumers(value)) != 1:
            break
        if is_op(node, "Cast", domain=""):
            value = node.inputs[0]
        elif is_op(node, "Add", domain="") and offset == 0.0:
            scalars = [small_constant(operand) for operand in node.inputs]
            which = next((i for i, s in enumerate(scalars) if s is not None and s.size == 1), None)
            if which is None:
                break
            scalar = scalars[which]
            assert scalar is not None
            offset = float(scalar.ravel()[0])
            value = node.inputs[1 - which]
        else:
            break
    return NoPath(f"the gain of {describe(reader)} is not a constant")


def _vector_operand(node: ir.Node, size: int) -> Constant | None:
    for operand in node.inputs:
        found = constant(operand)
        if found is not None and _is_vector(found, size):
            return found
    return None


def _other_operand(node: ir.Node, bias: Constant | None) -> ir.Value | None:
    for operand in node.inputs:
        if bias is None or operand is not bias.initializer:
            return operand
    return None


def _is_vector(found: Constant, size: int) -> bool:
    return found.tensor.size == size and found.shape[-1:] == (size,)
