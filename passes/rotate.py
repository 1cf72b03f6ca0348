"""Orthogonal rotation of the residual stream and of value heads, merged into the weights.

No proofs here: `faq_onnx.analysis.find_rotation` finds everything that reads or writes what is
rotated, or refuses. The arithmetic is in `quant.rotation`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, Tie, WeightLayout
from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import (
    TransformedTensor,
    find_initializer,
    read_initializer,
    transform_initializer,
)
from faq_onnx.passes.fold_scales import FOLDED_KEY
from faq_onnx.passes.nodes import (
    ProducerIndex,
    add_initializer,
    initializer_above,
    path_to_initializer,
    readers,
)
from faq_onnx.quant.rotation import HeadRotation, RowRotation, StreamRotation, rotate_weight

__all__ = [
    "ROTATED_KEY",
    "ResidualStream",
    "RotatePass",
    "RotationSites",
    "StreamReader",
    "ValueHeads",
]

ROTATED_KEY = "faq_onnx.rotation"
"""Metadata of a model: JSON {part: seed}, the part being "residual" or "heads"."""

_RESIDUAL, _HEADS = "residual", "heads"
_UNTIED_NAME = "lm_head.weight"

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class StreamReader:
    """A linear site that reads the stream, over a norm or as it is.

    Attributes:
        site: The reader.
        gain: Initializer of the norm's gain, None where there is none.
        offset: The effective gain is `gain + offset`.
    """

    site: LinearSite
    gain: str | None = None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """All that writes to the residual stream and all that reads it.

    Attributes:
        width: Channels of the stream.
        tables: Embeddings that begin it.
        writers: Linear sites whose output is added to it.
        readers: Linear sites that read it.
        vectors: Initializers [..., width] that are added to it (biases of the writers).
    """

    width: int
    tables: tuple[EmbeddingSite, ...]
    writers: tuple[LinearSite, ...]
    readers: tuple[StreamReader, ...]
    vectors: tuple[str, ...] = ()

    def head_of(self, table: EmbeddingSite) -> LinearSite | None:
        """The reader whose weight is tied to an embedding, None where there is none."""
        heads = (reader.site for reader in self.readers if reader.site.name == table.tied_site)
        return next(heads, None)


@dataclasses.dataclass(frozen=True)
class ValueHeads:
    """The values of one attention: rows of a projection, and who reads what attention returns.

    Attributes:
        values: The site that computes them.
        readers: Sites that read attention's output, [heads * head_dim] channels.
        kv_heads: Key/value heads.
        head_dim: Channels of one.
        repeats: Query heads that read one key/value head.
        row_start: First row of the values in their site.
    """

    values: LinearSite
    readers: tuple[LinearSite, ...]
    kv_heads: int
    head_dim: int
    repeats: int = 1
    row_start: int = 0


@dataclasses.dataclass(frozen=True)
class RotationSites:
    """What is to be rotated; None and () leave a part as it is."""

    stream: ResidualStream | None = None
    heads: tuple[ValueHeads, ...] = ()


@dataclasses.dataclass
class _Change:
    """What one weight takes."""

    layout: WeightLayout
    gain: npt.NDArray[np.float64] | None = None
    inputs: RowRotation | None = None
    outputs: RowRotation | None = None

    def apply(self, stored: Array) -> Array:
        """The weight as stored, in rotated coordinates, as stored."""
        matrix = stored[0] if self.layout is WeightLayout.ONE_K_N else stored
        oriented = matrix if self.layout is WeightLayout.N_K else matrix.T
        turned = rotate_weight(oriented, gain=self.gain, inputs=self.inputs, outputs=self.outputs)
        return (turned if self.layout is WeightLayout.N_K else turned.T).reshape(stored.shape)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """What a rotation does to a model: weights, vectors on the stream, gains; by initializer."""

    weights: dict[str, _Change] = dataclasses.field(default_factory=dict)
    vectors: dict[str, RowRotation] = dataclasses.field(default_factory=dict)
    offsets: dict[str, float] = dataclasses.field(default_factory=dict)

    def weight(self, name: str, layout: WeightLayout) -> _Change:
        """The change of one weight, to be added to."""
        return self.weights.setdefault(name, _Change(layout))

    def apply(self, model: ir.Model) -> None:
        """Let every initializer be computed when it is read."""
        for name, change in self.weights.items():
            transform_initializer(model, name, change.apply)
        for name, rotation in self.vectors.items():
            transform_initializer(model, name, functools.partial(_turn_vector, rotation))
        for name, offset in self.offsets.items():
            transform_initializer(model, name, functools.partial(_unit_gain, offset))


@dataclasses.dataclass(frozen=True)
class RotatePass(ir.passes.InPlacePass):
    """Turn the residual stream, and the values of each head, by random orthogonal matrices.

    1. Gains of the norms on the stream go into the weights that read them and become 1; then
       every reader takes Q on its input side, every writer, its bias and the embedding on their
       output side. A norm of root mean squares does not see Q, so no node is added.
    2. The rows of each key/value head take a matrix of their own, and the columns behind the query
       heads that read it take the same. The cache (`present.*.value`) is rotated, too.
    3. A head that shares its table with the embedding gets a table of its own, or is refused:
       rotated, the two differ by the last norm's gain.
    4. A weight that anything else reads is refused.
    5. Both sides are multiplied in float64 when the weight is read, and rounded once.
    6. A second run changes nothing: the model's metadata name what is rotated. Channel scales must
       be folded afterwards.

    Attributes:
        sites: From `faq_onnx.analysis.find_rotation`.
        seed: Of the rotations.
        untie_head: Allow rule 3.
    """

    sites: RotationSites = dataclasses.field(repr=False)
    seed: int = 0
    untie_head: bool = False

    def requires(self, model: ir.Model) -> None:
        """Every weight may change, and nothing is rotated or scaled in another way already.

        Raises:
            RewriteError: for the first that is.
        """
        pending = self._pending(model)
        if pending and FOLDED_KEY in model.metadata_props:
            raise RewriteError(
                "the model carries channel scales, which a rotation would undo; rotate first, "
                "then fold"
            )
        producers = ProducerIndex(model)
        if _RESIDUAL in pending:
            self._check_stream(model, producers)
        if _HEADS in pending:
            self._check_heads(model, producers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Collect what each weight takes, then let each be computed when it is read."""
        pending = self._pending(model)
        changes = _Changes()
        if _RESIDUAL in pending:
            assert self.sites.stream is not None
            self._turn_stream(model, self.sites.stream, changes)
        if _HEADS in pending:
            for index, heads in enumerate(self.sites.heads):
                self._turn_heads(index, heads, changes)
        changes.apply(model)
        if pending:
            done = _rotated(model) | dict.fromkeys(pending, self.seed)
            model.metadata_props[ROTATED_KEY] = json.dumps(done, sort_keys=True)
        return ir.passes.PassResult(model, modified=bool(pending))

    def _pending(self, model: ir.Model) -> list[str]:
        """Parts that are asked for and not done yet.

        Raises:
            RewriteError: where one is done with another seed.
        """
        wanted = [_RESIDUAL] if self.sites.stream is not None else []
        wanted += [_HEADS] if self.sites.heads else []
        done = _rotated(model)
        for part in wanted:
            if done.get(part, self.seed) != self.seed:
                raise RewriteError(
                    f"{part}: rotated with seed {done[part]} already, not with {self.seed}; start "
                    "from the unrotated model"
                )
        return [part for part in wanted if part not in done]

    def _check_stream(self, model: ir.Model, producers: ProducerIndex) -> None:
        stream = self.sites.stream
        assert stream is not None
        tables = {table.weight: table for table in stream.tables}
        for table in stream.tables:
            nodes = {producers.node(table.output, table.name)}
            head = stream.head_of(table)
            if head is not None:
                _check_tie(table, head, untie=self.untie_head)
                if table.tie is Tie.SHARED:
                    nodes.add(producers.node(head.output, head.name))
                    _check_own_carriers(producers.node(head.output, head.name))
            _check_only_read_by(find_initializer(model, table.weight), nodes, table.name)
        for site in (*stream.writers, *(reader.site for reader in stream.readers)):
            if site.weight not in tables:
                _check_weight(site, producers)
        for name in stream.vectors:
            _check_read_once(find_initializer(model, name), "the residual stream")

    def _check_heads(self, model: ir.Model, producers: ProducerIndex) -> None:
        for heads in self.sites.heads:
            for site in (heads.values, *heads.readers):
                _check_weight(site, producers)
            if heads.values.bias is not None:
                bias = find_initializer(model, heads.values.bias)
                _check_read_once(bias, heads.values.name)

    def _turn_stream(self, model: ir.Model, stream: ResidualStream, changes: _Changes) -> None:
        rotation = StreamRotation.random(stream.width, np.random.default_rng((self.seed, 0)))
        untied = dict(_untie(model, stream))
        producers = ProducerIndex(model)
        for table in stream.tables:
            layout = _layout_of_table(producers.node(table.output, table.name))
            changes.weight(table.weight, layout).inputs = rotation
        for site in stream.writers:
            changes.weight(site.weight, site.layout).outputs = rotation
        for reader in stream.readers:
            name = untied.get(reader.site.name, reader.site.weight)
            change = changes.weight(name, reader.site.layout)
            change.inputs = rotation
            if reader.gain is not None:
                stored = np.asarray(read_initializer(model, reader.gain), np.float64)
                change.gain = stored.ravel() + reader.offset
                changes.offsets[reader.gain] = reader.offset
        changes.vectors.update(dict.fromkeys(stream.vectors, rotation))

    def _turn_heads(self, index: int, heads: ValueHeads, changes: _Changes) -> None:
        rng = np.random.default_rng((self.seed, 1 + index))
        drawn = HeadRotation.random(heads.kv_heads, heads.head_dim, rng)
        values = dataclasses.replace(drawn, start=heads.row_start)
        site = heads.values
        changes.weight(site.weight, site.layout).outputs = values
        if site.bias is not None:
            changes.vectors[site.bias] = values
        for reader in heads.readers:
            attended = dataclasses.replace(drawn, repeats=heads.repeats)
            changes.weight(reader.weight, reader.layout).inputs = attended


def _rotated(model: ir.Model) -> dict[str, int]:
    """Parts that are rotated in this model, with their seeds."""
    done: dict[str, int] = json.loads(model.metadata_props.get(ROTATED_KEY, "{}"))
    return done


def _layout_of_table(gather: ir.Node) -> WeightLayout:
    """How the initializer of an embedding holds [rows, width]: as it is, or behind a Transpose."""
    above = (value.producer() for value in path_to_initializer(gather, 0))
    turns = sum(node is not None and node.op_type == "Transpose" for node in above)
    return WeightLayout.K_N if turns % 2 else WeightLayout.N_K


def _turn_vector(rotation: RowRotation, values: Array) -> Array:
    return rotation.rotate(values).astype(np.float32)


def _unit_gain(offset: float, values: Array) -> Array:
    """A gain whose effect, `offset` included, is none."""
    return np.full_like(values, 1 - offset)


def _untie(model: ir.Model, stream: ResidualStream) -> Iterator[tuple[str, str]]:
    """Give heads that read an embedding's table a copy; yields site and name of its table."""
    producers = ProducerIndex(model)
    for table in stream.tables:
        head = stream.head_of(table)
        if head is None or table.tie is not Tie.SHARED:
            continue
        node = producers.node(head.output, head.name)
        *carriers, shared = path_to_initializer(node, 1)
        assert shared.const_value is not None
        copy = TransformedTensor(shared.const_value, ())
        own = add_initializer(model.graph, _UNTIED_NAME, copy)
        above = carriers[-1].producer() if carriers else None
        if above is None:
            node.replace_input_with(1, own)
        else:
            above.replace_input_with(0, own)
        assert own.name is not None
        yield head.name, own.name


def _check_tie(table: EmbeddingSite, head: LinearSite, *, untie: bool) -> None:
    if untie:
        return
    size = table.rows * table.width * (4 if table.dtype == "float32" else 2)
    raise RewriteError(
        f"{head.name}: shares its table with the embedding {table.name}, and rotated the two "
        f"differ, because the last norm's gain goes into the head alone; allow it a table of its "
        f"own ({size} bytes more as {table.dtype}) with untie_head (--untie-head), or rotate the "
        "heads alone"
    )


def _check_own_carriers(node: ir.Node) -> None:
    """What stands between a shared table and the head must not lead anywhere else."""
    for value in path_to_initializer(node, 1)[:-1]:
        _check_read_once(value, node.name or node.op_type)


def _check_weight(site: LinearSite, producers: ProducerIndex) -> None:
    node = producers.node(site.output, site.name)
    _check_only_read_by(initializer_above(node, 1, site), {node}, site.name)


def _check_read_once(value: ir.Value, place: str) -> None:
    if len(value.uses()) > 1 or value.is_graph_output():
        raise RewriteError(
            f"{place}: {value.name!r} has other readers, so it cannot be rotated; leave this part "
            "unrotated"
        )


def _check_only_read_by(weight: ir.Value, nodes: set[ir.Node], place: str) -> None:
    """A weight that anything else reads, or that is visible from outside, must not change."""
    if weight.is_graph_input() or weight.is_graph_output():
        raise RewriteError(f"{place}: {weight.name!r} is an input or output of the graph")
    others = [node for node in readers(weight) if node not in nodes]
    if others:
        raise RewriteError(
            f"{place}: {weight.name!r} is also read by {others[0].name or others[0].op_type}, so "
            "it cannot be rotated; leave this part unrotated"
        )
