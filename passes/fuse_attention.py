"""Decomposed self-attention becomes com.microsoft.GroupQueryAttention.

No proofs here: `faq_onnx.analysis.find_attention` finds the blocks and proves that each computes
what the operator computes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from faq_onnx.errors import RewriteError
from faq_onnx.passes.nodes import (
    MICROSOFT_DOMAIN,
    ProducerIndex,
    add_initializer,
    import_microsoft_domain,
    take_place,
)

__all__ = ["AttentionBlock", "FuseAttentionPass", "HeadRows", "RotaryTable"]

# onnxruntime 1.31 and 1.32 rotate inside of the operator only where "head_size shall be a multiple
# of 16" and "cos_cache dimension 1 must be <= head_size / 2 and a multiple of 8".
_INSIDE_WIDTH, _INSIDE_PAIRS = 16, 8

_MASK = "attention_mask"
_SCOPE = "/faq_onnx/attention"  # names of the nodes that all layers share
_END = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, eq=False)
class RotaryTable:
    """Cosines and sines [positions, pairs] in the type of the cache.

    A pair are the channels c and c + pairs of a head; those from 2 * pairs on are not rotated.
    """

    cos: npt.NDArray[np.generic]
    sin: npt.NDArray[np.generic]

    @property
    def pairs(self) -> int:
        """Rotated pairs of a head."""
        return int(self.cos.shape[1])


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """Where a query, key or value is read: before rotation, before heads go first.

    Attributes:
        rows: Value [B, S, heads, head_dim].
        dtype: Its type.
        projection: The same as [B, S, heads * head_dim], where the graph has it.
        turned: Output of a Transpose that puts heads first in front of a norm; the norm is to
            read the Transpose's input, then `rows` has the shape said above.
    """

    rows: str
    dtype: ir.DataType
    projection: str | None = None
    turned: str | None = None


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """One self-attention, by the names of its values.

    Attributes:
        name: For the new node.
        query: Before rotation.
        key: Before rotation.
        value: The new rows.
        past: Graph inputs of past keys and values [B, kv_heads, P, head_dim].
        present: Graph outputs of all keys and values.
        output: [B, S, heads * head_dim].
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        dtype: Of past and present, in which the operator computes.
        scale: Factor of the scores.
        window: Keys that a query sees, its own included; None for all before it.
        rotary: Tables for query and key; None where they are not rotated.
        output_dtype: Type of `output`.
    """

    name: str
    query: HeadRows
    key: HeadRows
    value: HeadRows
    past: tuple[str, str]
    present: tuple[str, str]
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: ir.DataType
    scale: float
    window: int | None = None
    rotary: RotaryTable | None = dataclasses.field(default=None, repr=False)
    output_dtype: ir.DataType = ir.DataType.FLOAT

    @property
    def rotates_inside(self) -> bool:
        """Whether the operator's kernel rotates query and key itself."""
        return (
            self.rotary is not None
            and self.head_dim % _INSIDE_WIDTH == 0
            and self.rotary.pairs % _INSIDE_PAIRS == 0
        )


@dataclasses.dataclass(frozen=True)
class FuseAttentionPass(ir.passes.InPlacePass):
    """Compute each block in one GroupQueryAttention node, which can share its cache's buffer.

    1. Graph inputs and outputs stay as they are. Nothing may read position_ids any more, since
       positions are counted from the mask; the input stays, because optimum warns about
       decoders without it.
    2. Lengths are taken from attention_mask once for all blocks. Rows may be padded behind their
       text. Padding in front would be attended to, so it makes the operator fail: a length of
       zero is sent instead.
    3. Equal rotary tables are stored once. What the kernel cannot rotate - heads of no multiple of
       16 channels, or with rotated pairs of no multiple of 8 - goes through
       com.microsoft.RotaryEmbedding first.
    4. The operator computes in the type of the cache: query, key, value and output of another
       type are cast.
    5. Nodes that only the old attention needed are removed: masks, rotations, repeated heads.
    6. A second run changes nothing: a block whose cache is fused already is left alone.

    Attributes:
        blocks: What to fuse.
    """

    blocks: tuple[AttentionBlock, ...] = dataclasses.field(repr=False)

    def requires(self, model: ir.Model) -> None:
        """Every block is there, and the mask that lengths come from.

        Raises:
            RewriteError: for the first that is not.
        """
        producers = ProducerIndex(model)
        outputs = {value.name for value in model.graph.outputs}
        for block in self._pending(producers):
            _inputs(model, block)
            for name in (block.query.rows, block.key.rows, block.value.rows):
                producers.node(name, block.name)
            lost = [name for name in block.present if name not in outputs]
            if lost:
                raise RewriteError(
                    f"{block.name}: the graph has no output {lost[0]!r}; find the attention again"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in the order of the blocks, then remove what nothing reads."""
        producers = ProducerIndex(model)
        pending = self._pending(producers)
        if not pending:
            return ir.passes.PassResult(model, modified=False)
        graph = _Graph(model, producers)
        for block in pending:
            graph.fuse(block)
        common.RemoveUnusedNodesPass()(model)
        import_microsoft_domain(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every block is one node now.

        Raises:
            RewriteError: for the first that is not.
        """
        for block in self._pending(ProducerIndex(model)):
            raise RewriteError(f"{block.name}: was not rewritten; this is a bug in the pass")

    def _pending(self, producers: ProducerIndex) -> list[AttentionBlock]:
        nodes = ((block, producers.node(block.present[0], block.name)) for block in self.blocks)
        return [block for block, node in nodes if node.op_type != "GroupQueryAttention"]


def _inputs(model: ir.Model, block: AttentionBlock) -> list[ir.Value]:
    """Mask and past of a block.

    Raises:
        RewriteError: when the graph has no such input.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name in (_MASK, *block.past):
        if name not in inputs:
            raise RewriteError(
                f"{block.name}: the graph has no input {name!r}; inputs are "
                f"{', '.join(map(str, inputs))}"
            )
    return [inputs[name] for name in (_MASK, *block.past)]


class _Graph:
    """A graph while its blocks are fused."""

    def __init__(self, model: ir.Model, producers: ProducerIndex) -> None:
        self._model, self._graph = model, model.graph
        self._producers = producers
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        self._position_ids: ir.Value | None = None
        self._tables: dict[RotaryTable, tuple[ir.Value, ir.Value]] = {}
        self._numbers: dict[str, ir.Value] = {}

    def fuse(self, block: AttentionBlock) -> None:
        """Put the new node in the place of the old output."""
        mask, past_key, past_value = _inputs(self._model, block)
        old = self._value(block.output, block)
        place = old.producer()
        assert place is not None
        rows = [
            self._cast(self._rows(heads, block), heads.dtype, block.dtype, place)
            for heads in (block.query, block.key, block.value)
        ]
        totals = self._totals(mask)
        tables = () if block.rotary is None else self._rotary(block.rotary)
        if block.rotary is not None and not block.rotates_inside:
            positions = self._positions(mask, rows[0], place)
            for index, heads in enumerate((block.heads, block.kv_heads)):
                inputs = [rows[index], positions, *tables]
                rows[index] = self._rotate(inputs, heads, block, place)
            tables = ()
        node = ir.Node(
            MICROSOFT_DOMAIN,
            "GroupQueryAttention",
            [*rows, past_key, past_value, *totals, *tables],
            _attributes(block),
            num_outputs=3,
            name=block.name,
            version=1,
        )
        self._graph.insert_before(place, node)
        for new, name in zip(node.outputs[1:], block.present, strict=True):
            take_place(new, self._value(name, block))
        mixed = node.outputs[0]
        mixed.name = f"{block.name}_output"
        take_place(self._cast(mixed, block.dtype, block.output_dtype, place), old)

    def _cast(
        self, value: ir.Value, dtype: ir.DataType, wanted: ir.DataType, place: ir.Node
    ) -> ir.Value:
        """The value in another type, made in front of `place`."""
        if dtype == wanted:
            return value
        node = _node("Cast", [value], f"{value.name}_{wanted.name.lower()}", to=wanted)
        self._graph.insert_before(place, node)
        return node.outputs[0]

    def _rotate(
        self, inputs: list[ir.Value], heads: int, block: AttentionBlock, place: ir.Node
    ) -> ir.Value:
        """Rows [B, S, heads * head_dim] rotated in front of the operator."""
        assert block.rotary is not None
        attributes = [ir.AttrInt64("num_heads", heads)]
        if 2 * block.rotary.pairs < block.head_dim:
            attributes.append(ir.AttrInt64("rotary_embedding_dim", 2 * block.rotary.pairs))
        name = f"{inputs[0].name}_rotated"
        node = ir.Node(
            MICROSOFT_DOMAIN, "RotaryEmbedding", inputs, attributes, name=name, version=1
        )
        node.outputs[0].name = f"{node.name}_output"
        self._graph.insert_before(place, node)
        return node.outputs[0]

    def _positions(self, mask: ir.Value, rows: ir.Value, place: ir.Node) -> ir.Value:
        """Index of each new token in its text, int64 [B, S]; made once, in front of `place`."""
        if self._position_ids is None:
            zero, one = self._constant("zero", (0,)), self._constant("one", (1,))
            two, end = self._constant("two", (2,)), self._constant("end", (_END,))
            axis = self._constant("sequence_axis", 1)
            count = _node("CumSum", [mask, axis], f"{_SCOPE}/count")
            index = _node("Sub", [count.outputs[0], one], f"{_SCOPE}/index")
            known = _node("Max", [index.outputs[0], zero], f"{_SCOPE}/position")
            shape = _node("Shape", [rows], f"{_SCOPE}/rows_shape_of")
            length = _node("Slice", [shape.outputs[0], one, two], f"{_SCOPE}/new_tokens")
            start = _node("Neg", [length.outputs[0]], f"{_SCOPE}/first_new_token")
            inputs = [known.outputs[0], start.outputs[0], end, one]
            new = _node("Slice", inputs, f"{_SCOPE}/position_ids")
            nodes = [count, index, known, shape, length, start, new]
            self._graph.insert_before(place, nodes)
            self._position_ids = new.outputs[0]
        return self._position_ids

    def _value(self, name: str, block: AttentionBlock) -> ir.Value:
        node = self._producers.node(name, block.name)
        return next(value for value in node.outputs if value.name == name)

    def _rows(self, heads: HeadRows, block: AttentionBlock) -> ir.Value:
        """[B, S, heads * head_dim] of what is to be read."""
        if heads.projection is not None:
            return self._value(heads.projection, block)
        rows = self._value(heads.rows, block)
        if heads.turned is not None:
            _unturn(self._value(heads.turned, block), rows)
        producer = rows.producer()
        assert producer is not None
        shape = self._constant("rows_shape", (0, 0, -1))
        flat = _node("Reshape", [rows, shape], f"{block.name}/{producer.name}_rows")
        self._graph.insert_after(producer, flat)
        return flat.outputs[0]

    def _totals(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Index of the last token of each row, int32 [B], and the longest length, int32 []."""
        if self._lengths is not None:
            return self._lengths
        zero, one = self._constant("zero", (0,)), self._constant("one", (1,))
        first = _node("Slice", [mask, zero, one, one], f"{_SCOPE}/first_token")
        texts = _node("Mul", [mask, first.outputs[0]], f"{_SCOPE}/not_padded_in_front")
        length = _node("ReduceSum", [texts.outputs[0], one], f"{_SCOPE}/lengths", keepdims=0)
        last = _node("Sub", [length.outputs[0], one], f"{_SCOPE}/last_token")
        shape = _node("Shape", [mask], f"{_SCOPE}/mask_shape")
        axis = self._constant("sequence_axis", 1)
        total = _node("Gather", [shape.outputs[0], axis], f"{_SCOPE}/total")
        narrow = [
            _node("Cast", [node.outputs[0]], f"{node.name}_int32", to=ir.DataType.INT32)
            for node in (last, total)
        ]
        nodes = [first, texts, length, last, shape, total, *narrow]
        self._graph.insert_before(self._graph[0], nodes)
        self._lengths = narrow[0].outputs[0], narrow[1].outputs[0]
        return self._lengths

    def _rotary(self, table: RotaryTable) -> tuple[ir.Value, ir.Value]:
        for known, values in self._tables.items():
            if np.array_equal(known.cos, table.cos) and np.array_equal(known.sin, table.sin):
                return values
        values = (
            add_initializer(self._graph, "cos_cache", ir.tensor(table.cos)),
            add_initializer(self._graph, "sin_cache", ir.tensor(table.sin)),
        )
        self._tables[table] = values
        return values

    def _constant(self, name: str, numbers: int | tuple[int, ...]) -> ir.Value:
        if name not in self._numbers:
            tensor = ir.tensor(np.array(numbers, np.int64))
            self._numbers[name] = add_initializer(self._graph, f"{_SCOPE}/{name}", tensor)
        return self._numbers[name]


def _node(op_type: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}_output"
    return node


def _unturn(turned: ir.Value, last: ir.Value) -> None:
    """Let a norm up to `last` read rows as the projection gives them: its axes 1 and 2 swap."""
    node = turned.producer()
    assert node is not None
    source = node.inputs[0]
    assert source is not None
    readers = [use for use in turned.uses() if use.node.op_type != "Shape"]
    pending: list[ir.Value] = []
    for use in readers:
        use.node.replace_input_with(use.idx, source)
        pending += use.node.outputs
    while pending:
        value = pending.pop()
        value.shape = None  # it names the old order
        if value is not last:
            pending += [output for use in value.uses() for output in use.node.outputs]


def _attributes(block: AttentionBlock) -> list[ir.Attr]:
    attributes = [
        ir.AttrInt64("num_heads", block.heads),
        ir.AttrInt64("kv_num_heads", block.kv_heads),
        ir.AttrFloat32("scale", block.scale),
        ir.AttrInt64("do_rotary", int(block.rotates_inside)),
    ]
    if block.window is not None:
        attributes.append(ir.AttrInt64("local_window_size", block.window))
    return attributes
