"""From rows in heads back to the projection that they are split from, over a norm of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from faq_onnx.analysis.operands import constant, consumers, is_op, small_constant
from faq_onnx.analysis.paths import describe

__all__ = ["Heads", "Unmatched", "find_heads", "puts_heads_first", "take_input"]

_HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] <-> [B, H, S, D]
# What a norm over the last axis is written with; each works on rows alone.
_ROW_STEPS = frozenset(
    {
        *("Cast", "Identity", "Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Div", "Mul"),
        *("RMSNormalization", "SimplifiedLayerNormalization"),
    }
)


class Unmatched(Exception):  # noqa: N818 - leaves this room as NoPath
    """The graph is another one than looked for."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """A query, key or value in heads, before rotation.

    Attributes:
        rows: [B, S, heads, D]; [B, heads, S, D] as long as `turned` stands before it.
        turned: The Transpose that puts heads first before a norm that could do without.
        split: The Reshape that splits the projection into heads.
    """

    rows: ir.Value
    turned: ir.Node | None
    split: ir.Node


def puts_heads_first(node: ir.Node) -> bool:
    """Whether a Transpose swaps heads and sequence."""
    return tuple(node.attributes.get_ints("perm", ()) or ()) == _HEADS_FIRST


def take_input(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there.

    Raises:
        Unmatched: where it is not.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Unmatched(f"{describe(node)} has no input {index}")
    return value


def find_heads(value: ir.Value) -> Heads:
    """From heads-first rows back to the split of the projection.

    Raises:
        Unmatched: what stands between is no norm of rows.
    """
    turned = _behind_rows(value, "Transpose")
    if not puts_heads_first(turned):
        raise Unmatched(f"{describe(turned)} does not put heads before the sequence")
    rows = take_input(turned, 0)
    split = _behind_rows(rows, "Reshape")
    if value is turned.outputs[0]:
        return Heads(rows, None, split)
    return Heads(value, turned, split)


def _behind_rows(value: ir.Value, op_type: str) -> ir.Node:
    """The one node of a kind that all of `value` comes from through steps that keep rows apart."""
    found: set[ir.Node] = set()
    between: set[ir.Node] = set()
    for node in _row_steps(value, op_type):
        (found if node.op_type == op_type else between).add(node)
    if len(found) != 1:
        raise Unmatched(f"{value.name!r} comes from {len(found)} nodes {op_type}; expected one")
    node = found.pop()
    for step in between:
        outside = [each for each in consumers(step.outputs[0]) if each not in between]
        if outside and step.outputs[0] is not value:
            raise Unmatched(f"{step.outputs[0].name!r} is also read by {describe(outside[0])}")
    if between and any(each not in between for each in consumers(node.outputs[0])):
        raise Unmatched(f"{describe(node)} is read past the norm")
    return node


def _row_steps(value: ir.Value, op_type: str) -> Iterator[ir.Node]:
    """Nodes between `value` and the nearest ones of a kind, these included."""
    pending, seen = [value], set[ir.Node]()
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen or node.op_type == "Constant":
            continue
        seen.add(node)
        if not is_op(node, op_type, domain="") and node.op_type not in _ROW_STEPS:
            raise Unmatched(f"{describe(node)} between the projection and its heads is not known")
        yield node
        if node.op_type != op_type:
            _check_row_step(node)
            pending += [each for each in node.inputs if each is not None]


def _check_row_step(node: ir.Node) -> None:
    """A step of a norm must not look across rows."""
    for each in node.inputs[1:] if node.op_type == "ReduceMean" else node.inputs:
        found = None if each is None else constant(each)
        if found is not None and len(found.shape) > 1:
            raise Unmatched(f"{describe(node)} combines rows with {found.name!r} of rank > 1")
    if node.op_type == "ReduceMean":
        given = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = list(node.attributes.get_ints("axes", ()) or ()) if given is None else [*given]
        if axes not in ([-1], [3]) or node.attributes.get_int("keepdims", 1) != 1:
            raise Unmatched(f"{describe(node)} does not average over the last axis")
