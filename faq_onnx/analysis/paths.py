"""Walking from a value back to the linear layer, norm or graph input that it comes from.

Every function returns what it found or a `NoPath` that says, readably, why the walk ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from faq_onnx.analysis.linear_sites import FoundSite
from faq_onnx.analysis.operands import constant, consumers, dims, is_op, small_constant

__all__ = [
    "LinearRows",
    "NoPath",
    "SiteIndex",
    "describe",
    "readers_outside",
    "root_of",
    "trace_linear",
]

_VIEWS = ("Cast", "Identity", "Reshape")

SiteIndex = Mapping[str, FoundSite]  # by name of the value that the site's node produces


@dataclasses.dataclass(frozen=True)
class NoPath:
    """Why a walk did not arrive."""

    reason: str


@dataclasses.dataclass(frozen=True)
class LinearRows:
    """A value is rows `start : start + count` of what a linear site computes (plus its bias)."""

    found: FoundSite
    start: int
    count: int


def describe(node: ir.Node | None) -> str:
    """A node as messages name it."""
    if node is None:
        return "a graph input or constant"
    return f"{node.op_type} {(node.name or node.outputs[0].name)!r}"


def root_of(value: ir.Value) -> ir.Value:
    """The value that `value` is a cast or reshaped view of.

    A Reshape may change the last axis: whoever relies on channels compares their number at both
    ends, which suffices since views keep the row-major order.
    """
    while True:
        node = value.producer()
        if node is None or not is_op(node, *_VIEWS, domain="") or node.inputs[0] is None:
            return value
        if node.inputs[0].is_initializer():
            return value
        value = node.inputs[0]


def _only_reader(value: ir.Value, reader: ir.Node) -> NoPath | None:
    """None if `reader` is the only one that sees the numbers of `value`."""
    others = [node for node in consumers(value) if node is not reader]
    if others:
        return NoPath(f"{value.name!r} is also read by {describe(others[0])}")
    if value.is_graph_output():
        return NoPath(f"{value.name!r} is also a graph output")
    return None


def trace_linear(value: ir.Value, reader: ir.Node, sites: SiteIndex) -> LinearRows | NoPath:
    """Walk through bias Add, casts, Reshape, Split and Slice back to a linear site.

    Args:
        value: Where to start; its last axis (or last two, for heads) are output channels.
        reader: The node that reads it: any other reader on the way ends the walk.
        sites: Linear sites of the graph.
    """
    steps: list[_Step] = []
    while True:
        blocked = _blocked(value, reader)
        if blocked is not None:
            return blocked
        found = sites.get(value.name or "")
        if found is not None:
            return _rows(found, steps)
        node = value.producer()
        if node is None:
            return NoPath(f"{value.name!r} comes from {describe(None)}, not from a linear layer")
        step = _step(node, value)
        if isinstance(step, NoPath):
            return step
        steps.append(step)
        value, reader = step.value, node


def _rows(found: FoundSite, steps: Sequence[_Step]) -> LinearRows | NoPath:
    biases = [step.bias for step in steps if step.bias is not None]
    if any(bias != found.site.bias for bias in biases):
        return NoPath(f"{biases[0]!r} is added, but is not the bias of the whole layer")
    parts = [(step.start, step.count) for step in steps if step.count is not None]
    if len(parts) > 1:
        return NoPath(f"a part of a part of what {found.site.name!r} computes")
    start, count = parts[0] if parts else (0, found.site.out_features)
    return LinearRows(found, start, count)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One node further up, towards the linear site.

    Attributes:
        value: What the node reads.
        start: First of its channels that go on.
        count: How many go on; None: all.
        bias: Initializer that was added on the way.
    """

    value: ir.Value
    start: int = 0
    count: int | None = None
    bias: str | None = None


def _blocked(value: ir.Value, reader: ir.Node) -> NoPath | None:
    """As `_only_reader`, but sibling Slices of disjoint ranges do not disturb each other."""
    mine = _slice_range(reader)
    if mine is None:
        return _only_reader(value, reader)
    if value.is_graph_output():
        return NoPath(f"{value.name!r} is also a graph output")
    for other in consumers(value):
        theirs = _slice_range(other)
        if other is reader:
            continue
        if theirs is None or (theirs[0] < mine[1] and mine[0] < theirs[1]):
            return NoPath(f"{value.name!r} is also read by {describe(other)}")
    return None


def _step(node: ir.Node, value: ir.Value) -> _Step | NoPath:
    source = node.inputs[0] if node.inputs else None
    if is_op(node, *_VIEWS, domain="") and source is not None:
        return _Step(source)
    if is_op(node, "Add", domain=""):
        return _bias_step(node)
    if is_op(node, "Split", domain="") and source is not None:
        return _split_step(node, value, source)
    if is_op(node, "Slice", domain="") and source is not None:
        bounds = _slice_range(node)
        if bounds is not None:
            return _Step(source, bounds[0], bounds[1] - bounds[0])
    return NoPath(f"{value.name!r} comes from {describe(node)}, not straight from a linear layer")


def _bias_step(node: ir.Node) -> _Step | NoPath:
    """Through the Add of the bias that the site records (a bias must be scaled with its rows)."""
    for operand, other in (node.inputs, reversed(node.inputs)):
        addend = constant(operand)
        if addend is not None and len(addend.shape) == 1 and other is not None:
            return _Step(other, bias=addend.name)
    return NoPath(f"{describe(node)} adds something else than a bias")


def _split_step(node: ir.Node, value: ir.Value, source: ir.Value) -> _Step | NoPath:
    shape = dims(source)
    axis = node.attributes.get_int("axis", 0)
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        return NoPath(f"{describe(node)} splits axis {axis}, not the last")
    sizes = small_constant(node.inputs[1] if len(node.inputs) > 1 else None)
    position = list(node.outputs).index(value)
    if sizes is None:
        width = shape[-1] if shape else None
        parts = len(node.outputs)
        if width is None or width % parts:
            return NoPath(f"{describe(node)} splits into parts of unknown size")
        return _Step(source, position * (width // parts), width // parts)
    counts = [int(size) for size in sizes.ravel()]
    return _Step(source, sum(counts[:position]), counts[position])


def _slice_range(node: ir.Node) -> tuple[int, int] | None:
    """First and last + 1 channel of a Slice along the last axis, None for anything else."""
    if not is_op(node, "Slice", domain="") or len(node.inputs) < 4 or node.inputs[0] is None:
        return None
    constants = [small_constant(operand) for operand in node.inputs[1:]]
    starts, ends, axes = constants[:3]
    steps = constants[3] if len(constants) > 3 else None
    if starts is None or ends is None or axes is None or starts.size != 1:
        return None
    if steps is not None and int(steps.ravel()[0]) != 1:
        return None
    shape = dims(node.inputs[0])
    width = shape[-1] if shape else None
    axis = int(axes.ravel()[0])
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        return None
    start, end = int(starts.ravel()[0]), int(ends.ravel()[0])
    if width is not None:
        start, end = (bound + width if bound < 0 else min(bound, width) for bound in (start, end))
    return (start, end) if 0 <= start < end < 2**31 else None


def readers_outside(value: ir.Value, inside: Sequence[ir.Node]) -> NoPath | None:
    """None if only nodes of `inside` read `value`, or casts and reshaped views of it."""
    if value.is_graph_output():
        return NoPath(f"{value.name!r} is also a graph output")
    for node in consumers(value):
        if any(node is member for member in inside):
            continue
        if not is_op(node, *_VIEWS, domain="") or node.inputs[0] is not value:
            return NoPath(f"{value.name!r} is also read by {describe(node)}")
        blocked = readers_outside(node.outputs[0], inside)
        if blocked is not None:
            return blocked
    return None
