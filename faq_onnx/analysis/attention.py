"""From what o_proj reads back to the projection of the values, through real attention only.

A scale per value channel passes through attention because the output is a weighted sum of value
rows, head by head. With grouped-query attention several query heads read one value head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from faq_onnx.analysis.operands import consumers, dims, is_op, small_constant
from faq_onnx.analysis.paths import LinearRows, NoPath, SiteIndex, describe, root_of, trace_linear
from faq_onnx.artifacts.sites import Absorber, AbsorberKind

__all__ = ["ATTENTION_PRODUCERS", "attention_absorber"]

_HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] <-> [B, H, S, D]
_PAST_VALUE = {"GroupQueryAttention": 4, "Attention": 5, "MultiHeadAttention": 7}
ATTENTION_PRODUCERS = ("Transpose", "MatMul", *_PAST_VALUE)  # what can make o_proj's input
_PROBABILITY_STEPS = ("Cast", "Identity", "Where", "Dropout")


@dataclasses.dataclass(frozen=True)
class _Values:
    """The value operand of attention, walked back to before its heads were split.

    Attributes:
        value: [B, S, kv_heads * D].
        reader: The node that reads it on the way to attention.
        head_dim: D where the graph says it.
        has_past: The cache comes from a graph input.
    """

    value: ir.Value
    reader: ir.Node
    head_dim: int | None
    has_past: bool


def attention_absorber(
    root: ir.Value, in_features: int, sites: SiteIndex, config_head_dim: int | None
) -> Absorber | NoPath:
    """The value projection behind `root`, the activation that o_proj reads.

    Args:
        root: [B, S, heads * D], not a view of it: attention's output, or the Transpose after it.
        in_features: heads * D.
        sites: Linear sites by output.
        config_head_dim: D by config.json, asked last.
    """
    node = root.producer()
    if is_op(node, "Transpose", domain="") and node is not None:
        if tuple(node.attributes.get_ints("perm", ()) or ()) != _HEADS_FIRST:
            return NoPath(f"{describe(node)} does not put heads back behind the sequence")
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    if node is None:
        return NoPath(f"{root.name!r} is {describe(None)}, nothing before it can be scaled")
    if is_op(node, "MatMul", domain=""):
        return _decomposed(node, in_features, sites, config_head_dim)
    if is_op(node, *_PAST_VALUE):
        return _fused(node, in_features, sites, config_head_dim)
    return NoPath(f"{describe(node)} makes {root.name!r}, which is no attention")


def _decomposed(
    node: ir.Node, in_features: int, sites: SiteIndex, config_head_dim: int | None
) -> Absorber | NoPath:
    if not _is_softmax(node.inputs[0]):
        return NoPath(f"{describe(node)} is no attention: its left operand is no Softmax")
    assert node.inputs[1] is not None
    values = _walk_values(node.inputs[1], node)
    if isinstance(values, NoPath):
        return values
    rows = trace_linear(values.value, values.reader, sites)
    if isinstance(rows, NoPath):
        return rows
    return _absorber(rows, in_features, values.head_dim or config_head_dim)


def _fused(
    node: ir.Node, in_features: int, sites: SiteIndex, config_head_dim: int | None
) -> Absorber | NoPath:
    blocked = _unusual_fused(node)
    if blocked is not None:
        return blocked
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return _packed(node, in_features, sites)
    shape = dims(value)
    heads_split = node.op_type == "Attention" and not node.attributes.get_int("kv_num_heads", 0)
    if heads_split and (shape is None or len(shape) == 4):
        values = _walk_values(value, node)
        if isinstance(values, NoPath):
            return values
        rows = trace_linear(values.value, values.reader, sites)
        head_dim = values.head_dim
    else:
        rows = trace_linear(value, node, sites)
        heads = _heads(node)
        head_dim = in_features // heads if heads and in_features % heads == 0 else None
    if isinstance(rows, NoPath):
        return rows
    return _absorber(rows, in_features, head_dim or config_head_dim)


def _packed(node: ir.Node, in_features: int, sites: SiteIndex) -> Absorber | NoPath:
    heads, kv_heads = _heads(node), node.attributes.get_int("kv_num_heads", 0)
    if node.op_type != "GroupQueryAttention" or not heads or not kv_heads:
        return NoPath(f"{describe(node)} has no value input")
    if in_features % heads:
        return NoPath(f"{describe(node)}: {in_features} channels are no {heads} equal heads")
    head_dim = in_features // heads
    assert node.inputs[0] is not None
    rows = trace_linear(node.inputs[0], node, sites)
    if isinstance(rows, NoPath):
        return rows
    if rows.count != (heads + 2 * kv_heads) * head_dim:
        return NoPath(f"{describe(node)} reads {rows.count} packed channels of unknown order")
    first_value = rows.start + (heads + kv_heads) * head_dim
    values = LinearRows(rows.found, first_value, kv_heads * head_dim)
    return _absorber(values, in_features, head_dim)


def _heads(node: ir.Node) -> int | None:
    return node.attributes.get_int("num_heads", 0) or node.attributes.get_int("q_num_heads", 0)


def _unusual_fused(node: ir.Node) -> NoPath | None:
    def given(index: int) -> bool:
        return len(node.inputs) > index and node.inputs[index] is not None

    if node.op_type == "MultiHeadAttention" and given(3):
        return NoPath(f"{describe(node)} adds a bias to the values inside")
    if node.op_type == "GroupQueryAttention" and (given(12) or given(13)):
        return NoPath(f"{describe(node)} keeps a quantized cache")
    past = node.inputs[_PAST_VALUE[node.op_type]] if given(_PAST_VALUE[node.op_type]) else None
    if past is not None and not past.is_graph_input():
        return NoPath(f"{describe(node)} reads past values from {describe(past.producer())}")
    for output in node.outputs[1:]:
        if consumers(output):
            return NoPath(f"the cache of {describe(node)} is read inside the graph")
        if output.is_graph_output() and past is None:
            return NoPath(f"{describe(node)} hands its values to another model")
    return None


@dataclasses.dataclass
class _Walk:
    """Where the walk over values stands."""

    value: ir.Value
    reader: ir.Node
    head_dim: int | None
    has_past: bool = False
    is_repeated: bool = False
    is_split: bool = False  # arrived before the Transpose that put heads first

    def go_to(self, value: ir.Value | None, reader: ir.Node) -> None:
        """One node back."""
        assert value is not None
        self.value, self.reader = value, reader
        self.head_dim = self.head_dim or _last_dim(value)


def _walk_values(value: ir.Value, reader: ir.Node) -> _Values | NoPath:
    """Back over repeated heads, the cache, and the split into heads."""
    walk = _Walk(value, reader, _last_dim(value))
    while not walk.is_split:
        node = walk.value.producer()
        if node is None:
            return NoPath(f"{walk.value.name!r} is {describe(None)}, not computed by a layer")
        step = _VALUE_STEPS.get(node.op_type)
        if step is None or not is_op(node, node.op_type, domain=""):
            return NoPath(f"{describe(node)} in the path of the values is not plain attention")
        problem = _value_blocked(walk.value, walk.reader, node) or step(walk, node)
        if problem is not None:
            return problem
    return _Values(walk.value, walk.reader, walk.head_dim, walk.has_past)


def _over_view(walk: _Walk, node: ir.Node) -> NoPath | None:
    walk.go_to(node.inputs[0], node)
    return None


def _over_split(walk: _Walk, node: ir.Node) -> NoPath | None:
    if tuple(node.attributes.get_ints("perm", ()) or ()) != _HEADS_FIRST:
        return NoPath(f"{describe(node)} permutes the values in another way")
    walk.go_to(node.inputs[0], node)
    walk.is_split = True
    return None


def _over_cache(walk: _Walk, node: ir.Node) -> NoPath | None:
    past = None if node.inputs[0] is None else root_of(node.inputs[0])
    if walk.has_past or len(node.inputs) != 2 or past is None or not past.is_graph_input():
        return NoPath(f"{describe(node)} is not a cache [past, new]")
    if node.attributes.get_int("axis", 0) not in (-2, 2):
        return NoPath(f"{describe(node)} does not append along the sequence")
    walk.has_past = True
    walk.head_dim = walk.head_dim or _last_dim(past)
    walk.go_to(node.inputs[1], node)
    return None


def _over_repeat(walk: _Walk, node: ir.Node) -> NoPath | None:
    repeat = _repeated_heads(node)
    if walk.is_repeated or isinstance(repeat, NoPath):
        return repeat if isinstance(repeat, NoPath) else NoPath("heads are repeated twice")
    walk.is_repeated = True
    walk.go_to(repeat.inputs[0], repeat)
    return None


_VALUE_STEPS: dict[str, Callable[[_Walk, ir.Node], NoPath | None]] = {
    "Cast": _over_view,
    "Identity": _over_view,
    "Transpose": _over_split,
    "Concat": _over_cache,
    "Reshape": _over_repeat,
}


def _repeated_heads(node: ir.Node) -> ir.Node | NoPath:
    """The Unsqueeze of Reshape <- Expand <- Unsqueeze(2): each head next to its own copies."""
    assert node.inputs[0] is not None
    expand = node.inputs[0].producer()
    if not is_op(expand, "Expand", domain="") or expand is None or expand.inputs[0] is None:
        return NoPath(f"{describe(node)} reshapes values in another way than repeated heads")
    unsqueeze = expand.inputs[0].producer()
    if not is_op(unsqueeze, "Unsqueeze", domain="") or unsqueeze is None:
        return NoPath(f"{describe(expand)} expands values in another way than repeated heads")
    axes = small_constant(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else None
    listed = [int(axis) for axis in axes.ravel()] if axes is not None else []
    if (listed or list(unsqueeze.attributes.get_ints("axes", ()) or ())) not in ([2], [-3]):
        return NoPath(f"{describe(unsqueeze)} does not repeat heads side by side")
    for value, reader in ((node.inputs[0], node), (expand.inputs[0], expand)):
        if consumers(value) != [reader]:
            return NoPath(f"{value.name!r} is read by several nodes")
    return unsqueeze


def _value_blocked(value: ir.Value, reader: ir.Node, producer: ir.Node) -> NoPath | None:
    others = [node for node in consumers(value) if node is not reader]
    if others:
        return NoPath(f"the values {value.name!r} are also read by {describe(others[0])}")
    cached = is_op(producer, "Concat", domain="")
    if value.is_graph_output() and not cached:
        return NoPath(f"{value.name!r} hands the values to another model")
    return None


def _is_softmax(value: ir.Value | None) -> bool:
    for _ in range(8):  # Softmax -> NaN guard -> casts is the longest chain seen
        node = None if value is None else value.producer()
        if is_op(node, "Softmax", domain=""):
            return True
        if node is None or not is_op(node, *_PROBABILITY_STEPS, domain=""):
            return False
        value = node.inputs[2] if node.op_type == "Where" else node.inputs[0]
    return False


def _last_dim(value: ir.Value) -> int | None:
    shape = dims(value)
    return shape[-1] if shape is not None and len(shape) == 4 else None


def _absorber(rows: LinearRows, in_features: int, head_dim: int | None) -> Absorber | NoPath:
    site = rows.found.site
    where = f"{site.name!r} gives {rows.count} value channels for {in_features} inputs"
    if in_features % rows.count:
        return NoPath(f"{where}: no whole number of query heads per value head")
    repeats = in_features // rows.count
    if head_dim is None and repeats > 1:
        return NoPath(f"{where}, but the graph does not tell the head size; give config.json")
    if head_dim is not None and rows.count % head_dim:
        return NoPath(f"{where}: not a multiple of the head size {head_dim}")
    return Absorber(
        kind=AbsorberKind.LINEAR,
        site=site.name,
        row_start=rows.start,
        head_dim=head_dim,
        repeats=repeats,
    )
