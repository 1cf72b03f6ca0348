"""Find the parts of decomposed self-attention around a Softmax.

Found by shape of the graph only: what a match claims is proved by `attention_proof` with numbers,
so nothing here has to look at axes, slices and targets of Reshape. Casts may stand anywhere:
graphs in float16 compute masks, softmax, or whole layers in float32.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faq_onnx.analysis.attention_heads import (
    Heads,
    Unmatched,
    find_heads,
    puts_heads_first,
    take_input,
)
from faq_onnx.analysis.operands import constant, consumers, is_op, small_constant
from faq_onnx.analysis.paths import NoPath, describe

__all__ = ["AttentionMatch", "match_attention"]

_KEYS_LAST = ([0, 1, 3, 2], [0, 2, 1])


@dataclasses.dataclass(frozen=True)
class AttentionMatch:
    """One self-attention.

    Attributes:
        softmax: The node that it was found by.
        query: Before rotation.
        key: Before rotation.
        value: The new rows.
        cos: Of query and key, broadcast over heads; None where nothing is rotated.
        sin: As `cos`.
        past_key: Graph input.
        past_value: Graph input.
        present_key: Graph output.
        present_value: Graph output.
        repeated_key: [B, heads, T, D].
        mask: What is added to the scores.
        output: [B, S, heads * D].
        scale: Factor of the scores.
    """

    softmax: ir.Node
    query: Heads
    key: Heads
    value: Heads
    cos: ir.Value | None
    sin: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    repeated_key: ir.Value
    mask: ir.Value
    output: ir.Value
    scale: float

    @property
    def projected(self) -> tuple[Heads, Heads, Heads]:
        """Query, key and value."""
        return self.query, self.key, self.value


@dataclasses.dataclass(frozen=True)
class _Rotation:
    source: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None


@dataclasses.dataclass(frozen=True)
class _Cached:
    past: ir.Value
    present: ir.Value
    new: ir.Value


def match_attention(softmax: ir.Node) -> AttentionMatch | NoPath:
    """The attention around `softmax`, or why it is none that is known."""
    try:
        return _match(softmax)
    except Unmatched as error:
        return NoPath(str(error))


def _match(softmax: ir.Node) -> AttentionMatch:
    mixed, values = _mixing(softmax)
    product, mask, scale = _scores(take_input(softmax, 0))
    rotated_query, query_scale = _unscaled(take_input(product, 0))
    keys, key_scale = _keys(take_input(product, 1))
    key, value = _cached(_unrepeated(keys)), _cached(_unrepeated(values))
    query_rotation, key_rotation = _rotation(rotated_query), _rotation(key.new)
    if (query_rotation.cos, query_rotation.sin) != (key_rotation.cos, key_rotation.sin):
        raise Unmatched(f"{describe(softmax)}: query and key are rotated differently")
    return AttentionMatch(
        softmax=softmax,
        query=find_heads(_uncast(query_rotation.source)),
        key=find_heads(_uncast(key_rotation.source)),
        value=find_heads(_uncast(value.new)),
        cos=query_rotation.cos,
        sin=query_rotation.sin,
        past_key=key.past,
        past_value=value.past,
        present_key=key.present,
        present_value=value.present,
        repeated_key=keys,
        mask=mask,
        output=mixed,
        scale=scale * query_scale * key_scale,
    )


def _mixing(softmax: ir.Node) -> tuple[ir.Value, ir.Value]:
    """What leaves attention, [B, S, heads * D], and the values that it mixes."""
    value = softmax.outputs[0]
    for _ in range(4):  # Softmax -> NaN guard -> Cast is the longest chain seen
        nodes = [node for node in consumers(value) if not is_op(node, "IsNaN", domain="")]
        if len(nodes) != 1:
            raise Unmatched(f"{describe(softmax)} is read by {len(nodes)} nodes")
        node = nodes[0]
        if is_op(node, "MatMul", domain="") and node.inputs[0] is value:
            turned = _only(node, "Transpose")
            if not puts_heads_first(turned):
                raise Unmatched(f"{describe(turned)} does not put heads behind the sequence")
            return _only(turned, "Reshape").outputs[0], _uncast(take_input(node, 1))
        if not is_op(node, "Where", "Cast", "Identity", domain=""):
            raise Unmatched(f"{describe(node)} stands between {describe(softmax)} and the values")
        value = node.outputs[0]
    raise Unmatched(f"{describe(softmax)} is no attention: nothing is multiplied by it")


def _scores(value: ir.Value) -> tuple[ir.Node, ir.Value, float]:
    """The product of query and key, the mask added to it, and the factor of scores."""
    node = _producer(value, "Add", "Cast", "Identity")
    while node is not None and not is_op(node, "Add", domain=""):
        value = take_input(node, 0)
        node = _producer(value, "Add", "Cast", "Identity")
    if node is None:
        raise Unmatched(
            f"{describe(value.producer())} makes the scores; expected an Add of scores and mask"
        )
    problems = []
    for scores, mask in ((0, 1), (1, 0)):
        product, scale = _unscaled(take_input(node, scores))
        found = product.producer()
        if found is not None and is_op(found, "MatMul", domain="") and not _reads_weight(found):
            return found, take_input(node, mask), scale
        problems.append(describe(found))
    raise Unmatched(f"{' and '.join(problems)} meet in {describe(node)}; expected scores and mask")


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """The value before casts and multiplications by numbers, and their product."""
    scale = 1.0
    while True:
        node = _producer(value, "Mul", "Div", "Cast")
        if node is None:
            return value, scale
        if node.op_type == "Cast":
            value = take_input(node, 0)
            continue
        for index in (1, 0):
            number = small_constant(take_input(node, index))
            if number is not None and number.size == 1:
                break
        else:
            return value, scale
        if node.op_type == "Div" and index == 0:
            return value, scale
        factor = float(number.reshape(()).astype(np.float64))
        scale *= factor if node.op_type == "Mul" else 1 / factor
        value = take_input(node, 1 - index)


def _keys(value: ir.Value) -> tuple[ir.Value, float]:
    """Keys [B, heads, T, D] before their last axes are swapped, and their factor."""
    value, outer = _unscaled(value)
    node = _producer(value, "Reshape", "Transpose")
    if node is not None and node.op_type == "Reshape":  # dynamo swaps axes in three dimensions
        node = _producer(take_input(node, 0), "Transpose")
    perm = [] if node is None else list(node.attributes.get_ints("perm", ()) or ())
    if node is None or perm not in _KEYS_LAST:
        raise Unmatched(f"{describe(value.producer())} makes the keys; expected a Transpose")
    value, inner = _unscaled(take_input(node, 0))
    if len(perm) == 3:
        reshaped = _producer(value, "Reshape")
        if reshaped is None:
            raise Unmatched(f"{describe(value.producer())} makes the keys; expected a Reshape")
        value = take_input(reshaped, 0)
    return value, outer * inner


def _uncast(value: ir.Value) -> ir.Value:
    """The value before casts."""
    while (node := _producer(value, "Cast")) is not None:
        value = take_input(node, 0)
    return value


def _unrepeated(value: ir.Value) -> ir.Value:
    """Before Unsqueeze -> Expand -> Reshape; the value itself where heads are not repeated."""
    reshape = _producer(value, "Reshape")
    if reshape is None:
        return value
    expand = _producer(take_input(reshape, 0), "Expand")
    unsqueeze = None if expand is None else _producer(take_input(expand, 0), "Unsqueeze")
    if unsqueeze is None:
        raise Unmatched(f"{describe(reshape)}: not the way in which heads are repeated")
    return take_input(unsqueeze, 0)


def _cached(value: ir.Value) -> _Cached:
    """Past and new rows of a cache that the graph takes in and gives out."""
    node = _producer(_uncast(value), "Concat")
    if node is None or len(node.inputs) != 2:
        raise Unmatched(f"{describe(value.producer())}: expected a Concat of past and new rows")
    past, new = _uncast(take_input(node, 0)), take_input(node, 1)
    if not past.is_graph_input():
        raise Unmatched(f"{describe(node)}: its first operand {past.name!r} is no graph input")
    rows = node.outputs[0]
    casts = [each.outputs[0] for each in consumers(rows) if is_op(each, "Cast", domain="")]
    present = [each for each in (rows, *casts) if each.is_graph_output()]
    if len(present) != 1:
        raise Unmatched(
            f"{describe(node)}: {rows.name!r} is {len(present)} graph outputs, not one"
        )
    return _Cached(past, present[0], new)


def _rotation(value: ir.Value) -> _Rotation:
    """Of rotated rows their parts; the value itself where it is not rotated."""
    value = _uncast(value)
    concat = _producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return _whole_rotation(value)
    part, rest = _whole_rotation(take_input(concat, 0)), _sliced(take_input(concat, 1))
    if rest is None or part.cos is None or _sliced(part.source) is not rest:
        return _Rotation(value, None, None)
    return _Rotation(rest, part.cos, part.sin)  # of the first channels alone


def _whole_rotation(value: ir.Value) -> _Rotation:
    """Of x cos + rotate_half(x) sin its parts; the value itself where it is another one."""
    node = _producer(value, "Add")
    if node is None:
        return _Rotation(value, None, None)
    terms = [_producer(take_input(node, index), "Mul") for index in (0, 1)]
    for turned, plain in (terms, terms[::-1]):
        if turned is None or plain is None:
            continue
        for index in (0, 1):
            source = _half_turned(take_input(turned, index))
            if source is not None and source in plain.inputs:
                cos = take_input(plain, 1 - list(plain.inputs).index(source))
                sin = take_input(turned, 1 - index)
                return _Rotation(source, _uncast(cos), _uncast(sin))
    return _Rotation(value, None, None)


def _half_turned(value: ir.Value) -> ir.Value | None:
    """The x of Concat(-second half of x, first half of x)."""
    concat = _producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    negated = _producer(take_input(concat, 0), "Neg")
    second = None if negated is None else _sliced(take_input(negated, 0))
    return second if second is _sliced(take_input(concat, 1)) else None


def _sliced(value: ir.Value) -> ir.Value | None:
    """What a value is a part of."""
    node = _producer(value, "Slice", "Split")
    return None if node is None else node.inputs[0]


def _reads_weight(node: ir.Node) -> bool:
    return any(constant(value) is not None for value in node.inputs)


def _only(node: ir.Node, op_type: str) -> ir.Node:
    """The one reader of a node's output."""
    nodes = consumers(node.outputs[0])
    if len(nodes) != 1 or not is_op(nodes[0], op_type, domain=""):
        raise Unmatched(f"{describe(node)}: expected to be read by one {op_type}")
    return nodes[0]


def _producer(value: ir.Value, *op_types: str) -> ir.Node | None:
    node = value.producer()
    return node if is_op(node, *op_types, domain="") else None
