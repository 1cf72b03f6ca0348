"""What a rotation has to touch: all that reads or writes the residual stream, and value heads.

The stream is followed from the embeddings in both directions over every node that keeps channels
apart or adds values, until each end is a linear site. What is not understood is refused, with its
place: a rotation that misses one reader is another model.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import onnx_ir as ir

from faq_onnx.analysis.norms import Gain, find_gain
from faq_onnx.analysis.operands import constant, consumers, dims, is_op, small_constant
from faq_onnx.analysis.paths import describe
from faq_onnx.artifacts.sites import EmbeddingSite, GroupRole, LinearSite, ModelCensus
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.passes.fuse_norms import match_unit_rows
from faq_onnx.passes.rotate import ResidualStream, RotationSites, StreamReader, ValueHeads

__all__ = ["find_rotation"]

_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")
_SKIP_NORM = "SkipSimplifiedLayerNormalization"  # (input, skip, gain, bias) -> norm, , , sum
_CENTRED_NORMS = ("LayerNormalization", "SkipLayerNormalization")
_SUM_OUTPUT = 3


def find_rotation(
    model: ir.Model, census: ModelCensus, *, residual: bool, heads: bool
) -> RotationSites:
    """Everything that `RotatePass` has to touch, proved to be all.

    Args:
        model: Canonical; not changed.
        census: Of it.
        residual: Find the residual stream.
        heads: Find the values of every attention.

    Raises:
        UnsupportedModelError: A rotation would not be exact; names the place and the reason.
    """
    return RotationSites(
        stream=_StreamSearch(model, census).run() if residual else None,
        heads=_find_heads(census) if heads else (),
    )


def _find_heads(census: ModelCensus) -> tuple[ValueHeads, ...]:
    found = []
    for group in census.groups:
        if group.role is not GroupRole.ATTENTION_OUTPUT:
            continue
        absorber = group.absorber
        if absorber is None or absorber.site is None or absorber.head_dim is None:
            reason = group.reason or "the graph does not tell the size of a head"
            raise UnsupportedModelError(
                f"{group.name}: its value heads cannot be rotated: {reason}; leave out 'heads'"
            )
        found.append(
            ValueHeads(
                values=census.site(absorber.site),
                readers=tuple(census.site(name) for name in group.sites),
                kv_heads=group.in_features // absorber.repeats // absorber.head_dim,
                head_dim=absorber.head_dim,
                repeats=absorber.repeats,
                row_start=absorber.row_start,
            )
        )
    if not found:
        raise UnsupportedModelError("no attention was found, so there are no heads to rotate")
    return tuple(found)


@dataclasses.dataclass
class _StreamSearch:
    """One walk over everything that is connected to the embeddings without a linear site."""

    model: ir.Model
    census: ModelCensus

    def __post_init__(self) -> None:
        self._sites = {site.output: site for site in self.census.sites}
        self._tables = {table.output: table for table in self.census.embeddings}
        self._seen: set[ir.Value] = set()
        self._pending: list[ir.Value] = []
        self._begins: dict[str, EmbeddingSite] = {}
        self._writers: dict[str, LinearSite] = {}
        self._readers: dict[str, StreamReader] = {}
        self._vectors: dict[str, None] = {}
        widths = {table.width for table in self.census.embeddings}
        if len(widths) != 1:
            _refuse(f"it begins at one token embedding, and {len(self._tables)} were found")
        (self._width,) = widths

    def run(self) -> ResidualStream:
        """The stream; every value on it is looked at from both sides."""
        for node in self.model.graph:
            if node.outputs[0].name in self._tables:
                self._enter(node.outputs[0])
        while self._pending:
            value = self._pending.pop()
            self._follow_back(value)
            self._follow(value)
        return ResidualStream(
            width=self._width,
            tables=tuple(self._begins.values()),
            writers=tuple(s for s in self.census.sites if s.name in self._writers),
            readers=tuple(
                self._readers[s.name] for s in self.census.sites if s.name in self._readers
            ),
            vectors=tuple(self._vectors),
        )

    def _enter(self, value: ir.Value | None) -> None:
        """Another value on the stream."""
        if value is None or value in self._seen:
            return
        if value.is_graph_output():
            _refuse(f"the graph gives {value.name!r} out, which lies on it")
        shape = dims(value)
        if shape and shape[-1] not in {None, self._width}:
            _refuse(f"{value.name!r} has {shape[-1]} channels instead of {self._width}")
        self._seen.add(value)
        self._pending.append(value)

    def _follow_back(self, value: ir.Value) -> None:
        """Where a value on the stream comes from: a writer, or other values on it."""
        node, name = value.producer(), value.name or ""
        if name in self._tables:
            self._begins[name] = self._tables[name]
        elif name in self._sites:
            self._write(self._sites[name])
        elif node is None:
            _refuse(f"{name!r}, {describe(None)}, is added to it")
        elif is_op(node, "Add", domain=""):
            self._add(node)
        elif is_op(node, _SKIP_NORM) and value in node.outputs[_SUM_OUTPUT:]:
            self._skip_norm(node)
        else:
            source = _same_rows(node)
            if source is None:
                _refuse(
                    f"{describe(node)} writes to it, and is neither an embedding nor a linear "
                    "layer (a norm behind a layer, as Gemma has, keeps its gain to itself)"
                )
            self._enter(source)

    def _follow(self, value: ir.Value) -> None:
        """Who reads a value on the stream: sites, norms, or what lies on it too."""
        nodes = consumers(value)
        norms: list[ir.Node] = []
        for node in nodes:
            scaled = _decomposed_norm(node, value)
            if scaled is not None:
                norms += [node, scaled]
                self._follow_norm(scaled.outputs[0], None)
        for node in nodes:
            if node not in norms:
                self._read_by(node, value)

    def _read_by(self, node: ir.Node, value: ir.Value) -> None:
        site = self._sites.get(node.outputs[0].name or "")
        if site is not None and node.inputs[0] is value:
            self._read(site, None)
        elif is_op(node, "Add", domain=""):
            self._add(node)
        elif is_op(node, _SKIP_NORM) and value in node.inputs[:2]:
            self._skip_norm(node)
        elif is_op(node, *_NORMS) and node.inputs[0] is value:
            self._follow_norm(node.outputs[0], self._gain_of(node, 1))
        elif is_op(node, *_CENTRED_NORMS):
            _refuse(f"{describe(node)} subtracts the mean of its channels, which turns with them")
        elif _same_rows(node) is value:
            self._enter(node.outputs[0])
        else:
            _refuse(f"{describe(node)} reads {value.name!r} channel by channel")

    def _add(self, node: ir.Node) -> None:
        """A sum: everything in it lies on the stream, but for constant vectors."""
        for operand in node.inputs:
            vector = constant(operand)
            if vector is None:
                self._enter(operand)
            elif vector.tensor.size == vector.shape[-1] == self._width:
                self._vectors[vector.name] = None
            else:
                _refuse(f"{describe(node)} adds the constant {vector.name!r} to it")
        self._enter(node.outputs[0])

    def _skip_norm(self, node: ir.Node) -> None:
        """A sum and its norm in one node."""
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            _refuse(f"{describe(node)} adds a bias inside")
        gain = self._gain_of(node, 2)
        self._enter(node.inputs[0])
        self._enter(node.inputs[1])
        self._follow_norm(node.outputs[0], gain)
        if len(node.outputs) > _SUM_OUTPUT and node.outputs[_SUM_OUTPUT].name:
            self._enter(node.outputs[_SUM_OUTPUT])

    def _gain_of(self, node: ir.Node, index: int) -> Gain:
        """The gain of a norm operator over the last axis."""
        axis = node.attributes.get_int("axis", -1)
        shape = dims(node.inputs[0]) if node.inputs[0] is not None else None
        if axis != -1 and (shape is None or axis != len(shape) - 1):
            _refuse(f"{describe(node)} does not normalise the last axis alone")
        return self._checked(find_gain(node.inputs[index], node), node)

    def _checked(self, gain: Gain | object, node: ir.Node) -> Gain:
        if not isinstance(gain, Gain) or gain.initializer.tensor.size != self._width:
            _refuse(f"the gain of {describe(node)} is not a constant of {self._width} channels")
        if len(consumers(gain.initializer.initializer)) != 1:
            _refuse(f"the gain of {describe(node)} is used by other nodes too")
        return gain

    def _follow_norm(self, value: ir.Value, gain: Gain | None) -> None:
        """Who reads a norm's output: linear sites alone, over one gain at most."""
        if value.is_graph_output():
            _refuse(f"the graph gives {value.name!r} out, which is a norm of it")
        for node in consumers(value):
            site = self._sites.get(node.outputs[0].name or "")
            if site is not None and node.inputs[0] is value:
                self._read(site, gain)
            elif _same_rows(node) is value:
                self._follow_norm(node.outputs[0], gain)
            elif gain is None and is_op(node, "Mul", domain=""):
                other = next(each for each in node.inputs if each is not value)
                self._follow_norm(node.outputs[0], self._checked(find_gain(other, node), node))
            else:
                _refuse(f"{describe(node)} reads its norm {value.name!r} channel by channel")

    def _read(self, site: LinearSite, gain: Gain | None) -> None:
        self._check_site(site, site.in_features)
        self._readers[site.name] = StreamReader(
            site,
            gain=None if gain is None else gain.initializer.name,
            offset=0.0 if gain is None else gain.offset,
        )

    def _write(self, site: LinearSite) -> None:
        self._check_site(site, site.out_features)
        self._writers[site.name] = site
        if site.op_type == "Gemm" and site.bias is not None:
            self._vectors[site.bias] = None

    def _check_site(self, site: LinearSite, channels: int) -> None:
        if site.in_subgraph:
            _refuse(f"{site.name} is in a subgraph")
        if channels != self._width:
            _refuse(f"{site.name} has {channels} channels on it instead of {self._width}")


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModelError(
        f"the residual stream cannot be rotated: {reason}; leave out 'residual'"
    )


def _same_rows(node: ir.Node) -> ir.Value | None:
    """The operand that a node hands on without looking at single channels, None if it does."""
    source = node.inputs[0] if node.inputs else None
    if is_op(node, "Cast", "Identity", "Reshape", domain=""):
        return source
    if is_op(node, "Slice", "Gather", domain=""):
        return source if _takes_rows(node) else None
    if is_op(node, "Mul", "Div", domain=""):
        if _is_number(node.inputs[1]):
            return source
        return node.inputs[1] if node.op_type == "Mul" and _is_number(source) else None
    return None


def _takes_rows(node: ir.Node) -> bool:
    """Whether a Slice or Gather leaves the last axis alone."""
    assert node.inputs[0] is not None
    shape = dims(node.inputs[0])
    if node.op_type == "Gather":
        axes = [node.attributes.get_int("axis", 0) or 0]
    else:
        given = small_constant(node.inputs[3]) if len(node.inputs) > 3 else None
        axes = [-1] if given is None else [int(axis) for axis in given.ravel()]
    if shape is None:
        return all(axis < -1 for axis in axes)
    return all(axis % len(shape) != len(shape) - 1 for axis in axes)


def _is_number(value: ir.Value | None) -> bool:
    found = small_constant(value)
    return found is not None and found.size == 1


def _decomposed_norm(square: ir.Node, value: ir.Value) -> ir.Node | None:
    """The node that ends a decomposed norm of `value` without its gain, if `square` begins one."""
    means = consumers(square.outputs[0])
    if len(means) != 1 or not is_op(means[0], "ReduceMean", domain=""):
        return None
    unit = match_unit_rows(means[0])
    return unit.scaled if unit is not None and unit.value is value else None
