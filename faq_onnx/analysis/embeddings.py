"""Find token embeddings and the output heads that share their table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.analysis.linear_sites import FoundSite
from faq_onnx.analysis.operands import FLOAT_TYPES, Constant, all_nodes, constant, is_op
from faq_onnx.artifacts.sites import EmbeddingSite, LinearRole, Tie, WeightLayout

__all__ = ["find_embeddings"]

_INDEX_VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Clip", "Where", "Flatten")
_NOT_TOKENS = ("position", "mask", "type", "cache")  # inputs that index other tables
_COMPARED_ROWS = 4096  # rows of the table in memory at a time


def find_embeddings(model: ir.Model, sites: Sequence[FoundSite]) -> list[EmbeddingSite]:
    """Gather(axis=0) nodes from constant tables, indexed by the token ids of a graph input."""
    found = []
    for node in all_nodes(model):
        if not is_op(node, "Gather", domain="") or node.attributes.get_int("axis", 0) != 0:
            continue
        table = constant(node.inputs[0])
        if table is None or len(table.shape) != 2 or table.tensor.dtype not in FLOAT_TYPES:
            continue
        if _indexed_by_tokens(node.inputs[1]):
            found.append(_make_embedding(node, table, sites))
    return found


def _indexed_by_tokens(value: ir.Value | None) -> bool:
    while value is not None:
        if value.is_graph_input():
            name = (value.name or "").lower()
            return not any(word in name for word in _NOT_TOKENS)
        node = value.producer()
        if node is None or not is_op(node, *_INDEX_VIEWS, domain=""):
            return False
        value = node.inputs[1] if node.op_type == "Where" else node.inputs[0]
    return False


def _make_embedding(node: ir.Node, table: Constant, sites: Sequence[FoundSite]) -> EmbeddingSite:
    output = node.outputs[0].name
    assert output is not None
    tied, tie = _find_tie(table, sites)
    return EmbeddingSite(
        name=node.name or output,
        output=output,
        weight=table.name,
        rows=table.shape[0],
        width=table.shape[1],
        dtype=FLOAT_TYPES[table.tensor.dtype],
        tied_site=tied,
        tie=tie,
    )


def _find_tie(table: Constant, sites: Sequence[FoundSite]) -> tuple[str | None, Tie | None]:
    for found in sites:
        if found.weight is table.initializer:
            return found.site.name, Tie.SHARED
    for found in sites:
        site = found.site
        if (site.out_features, site.in_features) != table.shape:
            continue
        if site.role in (LinearRole.LM_HEAD, LinearRole.OTHER) and _equal(table, found):
            return site.name, Tie.DUPLICATE
    return None, None


def _equal(table: Constant, found: FoundSite) -> bool:
    other = found.weight.const_value
    assert other is not None
    if other.dtype != table.tensor.dtype:
        return False
    other_transposed = found.site.layout is not WeightLayout.N_K
    for start in range(0, table.shape[0], _COMPARED_ROWS):
        rows = slice(start, start + _COMPARED_ROWS)
        mine = _rows(table.tensor, rows, transposed=table.transposed)
        if not np.array_equal(mine, _rows(other, rows, transposed=other_transposed)):
            return False
    return True


def _rows(tensor: ir.TensorProtocol, rows: slice, *, transposed: bool) -> npt.NDArray[np.generic]:
    """Rows of a table as integers of its width, read without keeping the file mapped."""
    values = _view(tensor)
    if values.ndim == 3:
        values = values[0]
    part = values[:, rows].T if transposed else values[rows]
    return np.ascontiguousarray(part)


def _view(tensor: ir.TensorProtocol) -> npt.NDArray[np.generic]:
    width = np.uint16 if tensor.dtype.itemsize == 2 else np.uint32
    if not isinstance(tensor, ir.ExternalTensor):
        return np.ascontiguousarray(tensor.numpy()).view(width)
    return np.memmap(
        tensor.path, width, "r", offset=tensor.offset or 0, shape=tuple(tensor.shape.numpy())
    )
