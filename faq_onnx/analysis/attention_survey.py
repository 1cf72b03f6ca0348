"""All attention of a model: what FuseAttentionPass may fuse, and why the rest stays."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faq_onnx.analysis.attention_match import match_attention
from faq_onnx.analysis.attention_proof import AttentionProver
from faq_onnx.analysis.operands import is_op
from faq_onnx.analysis.paths import NoPath, describe
from faq_onnx.passes.fuse_attention import AttentionBlock
from faq_onnx.runtime.feeds import cache_position

__all__ = ["AttentionSurvey", "Declined", "find_attention"]

_MASK = "attention_mask"
_FUSED = "GroupQueryAttention"
_OTHERS = ("Attention", "MultiHeadAttention", "SparseAttention")


@dataclasses.dataclass(frozen=True)
class Declined:
    """One attention that stays as it is."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class AttentionSurvey:
    """Attention in graph order.

    Attributes:
        blocks: What can be fused.
        declined: What cannot, with the reason.
        fused: Nodes that are GroupQueryAttention already.
    """

    blocks: tuple[AttentionBlock, ...]
    declined: tuple[Declined, ...]
    fused: int

    @property
    def layers(self) -> int:
        """All attention found."""
        return len(self.blocks) + len(self.declined) + self.fused


def find_attention(model: ir.Model, positions: int) -> AttentionSurvey:
    """Find every attention and prove which may be fused.

    Args:
        model: Canonical; float or with low-bit linear layers.
        positions: Longest text; rotary tables get as many rows.
    """
    blocks: list[AttentionBlock] = []
    declined: list[Declined] = []
    obstacle = _obstacle(model)
    prover = AttentionProver(model, positions)
    nodes = list(model.graph)
    for node in nodes:
        if is_op(node, *_OTHERS):
            declined.append(Declined(_name(node), f"{node.op_type} is fused in its own way"))
        if not is_op(node, "Softmax", domain="") or not _is_attention(node):
            continue
        if obstacle is not None:
            found: AttentionBlock | NoPath = obstacle
        else:
            match = match_attention(node)
            name = _name(node)
            found = match if isinstance(match, NoPath) else prover.prove(match, name)
        if isinstance(found, NoPath):
            declined.append(Declined(_name(node), found.reason))
        else:
            blocks.append(found)
    fused = sum(is_op(node, _FUSED) for node in nodes)
    return AttentionSurvey(tuple(blocks), tuple(declined), fused)


def _obstacle(model: ir.Model) -> NoPath | None:
    """What keeps every attention of a graph as it is."""
    inputs = {value.name: value for value in model.graph.inputs}
    if _MASK not in inputs or inputs[_MASK].dtype != ir.DataType.INT64:
        return NoPath(f"the graph has no int64 input {_MASK!r}")
    presents = {cache_position(value.name or ""): value for value in model.graph.outputs}
    for value in model.graph.inputs:
        position = cache_position(value.name or "")
        present = presents.get(position) if position is not None else None
        if present is not None and present.dtype != value.dtype:
            return NoPath(
                f"the cache goes in as {value.dtype} ({value.name}) and comes out as "
                f"{present.dtype} ({present.name}); export in float32"
            )
    return None


def _is_attention(softmax: ir.Node) -> bool:
    """Not the softmax of a router or of the model's output."""
    axis = softmax.attributes.get_int("axis", -1)
    return axis in (-1, 3) and not softmax.outputs[0].is_graph_output()


def _name(node: ir.Node) -> str:
    """For the fused node: the scope of the old one."""
    if not node.name or "/" not in node.name:
        return f"{node.name or describe(node)}_{_FUSED}"
    return f"{node.name.rsplit('/', 1)[0]}/{_FUSED}"
