"""Scale groups: sites that read one activation, and who can take the inverse scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faq_onnx.analysis.attention import ATTENTION_PRODUCERS, attention_absorber
from faq_onnx.analysis.linear_sites import FoundSite
from faq_onnx.analysis.norms import norm_absorber
from faq_onnx.analysis.operands import consumers, is_op
from faq_onnx.analysis.paths import NoPath, SiteIndex, readers_outside, root_of, trace_linear
from faq_onnx.artifacts.sites import Absorber, AbsorberKind

__all__ = ["FoundGroup", "find_groups"]


@dataclasses.dataclass(frozen=True)
class FoundGroup:
    """A group before it has a name; members are in graph order."""

    members: tuple[FoundSite, ...]
    root: ir.Value
    absorber: Absorber | None
    reason: str
    scalable: bool
    via_attention: bool = False

    @property
    def input(self) -> str:
        """The value all members read, or the one that they read views of."""
        direct = {member.site.input for member in self.members}
        name = direct.pop() if len(direct) == 1 else self.root.name
        return name or ""


def find_groups(sites: Sequence[FoundSite], config_head_dim: int | None) -> list[FoundGroup]:
    """Partition the sites by activation and look for absorbers, in graph order."""
    index = {found.site.output: found for found in sites}
    return [
        _examine(members, reason, index, config_head_dim) for members, reason in _partition(sites)
    ]


def _partition(sites: Sequence[FoundSite]) -> list[tuple[list[FoundSite], str]]:
    partition: list[tuple[list[FoundSite], str]] = []
    by_root: dict[int, list[FoundSite]] = {}
    for found in sites:
        reason = _unscalable(found)
        if reason:
            partition.append(([found], reason))
            continue
        key = id(root_of(found.input))
        if key not in by_root:
            by_root[key] = []
            partition.append((by_root[key], ""))
        by_root[key].append(found)
    return partition


def _unscalable(found: FoundSite) -> str:
    """Why the weight of this site must not change, "" if it may."""
    if found.site.in_subgraph:
        return "the site is in a subgraph, which is not calibrated"
    if found.weight.is_graph_output():
        return f"the weight {found.weight.name!r} is a graph output"
    values = [found.weight]
    while values:
        value = values.pop()
        for node in consumers(value):
            if is_op(node, "Transpose", "Identity", domain=""):
                values.append(node.outputs[0])
            elif node is not found.node:
                kind = "embedding" if node.op_type == "Gather" else node.op_type
                return f"the weight {found.weight.name!r} is shared with {kind} {node.name!r}"
    return ""


def _examine(
    members: Sequence[FoundSite], reason: str, index: SiteIndex, config_head_dim: int | None
) -> FoundGroup:
    root = root_of(members[0].input)
    if reason:
        return FoundGroup(tuple(members), root, None, reason, scalable=False)
    blocked = readers_outside(root, [member.node for member in members])
    if blocked is not None:
        return FoundGroup(tuple(members), root, None, blocked.reason, scalable=True)
    in_features = members[0].site.in_features
    via_attention = is_op(root.producer(), *ATTENTION_PRODUCERS)
    if via_attention:
        result = attention_absorber(root, in_features, index, config_head_dim)
    else:
        result = norm_absorber(root, in_features)
    if isinstance(result, NoPath) and is_op(root.producer(), "Mul", domain=""):
        result = _gated_absorber(root, in_features, index)
    if isinstance(result, Absorber):
        result = _refuse_shared(result, index)
    if isinstance(result, NoPath):
        return FoundGroup(tuple(members), root, None, result.reason, scalable=True)
    return FoundGroup(tuple(members), root, result, "", scalable=True, via_attention=via_attention)


def _gated_absorber(root: ir.Value, in_features: int, index: SiteIndex) -> Absorber | NoPath:
    """down_proj reads act(gate) * up: the rows of up take the inverse scale."""
    node = root.producer()
    assert node is not None
    reasons = []
    for operand in reversed(node.inputs):
        if operand is None:
            continue
        rows = trace_linear(operand, node, index)
        if isinstance(rows, NoPath):
            reasons.append(rows.reason)
        elif rows.count == in_features:
            return Absorber(
                kind=AbsorberKind.LINEAR, site=rows.found.site.name, row_start=rows.start
            )
        else:
            reasons.append(f"{rows.found.site.name!r} gives {rows.count} channels")
    return NoPath("no factor of the product is a linear layer alone: " + "; ".join(reasons))


def _refuse_shared(absorber: Absorber, index: SiteIndex) -> Absorber | NoPath:
    """A weight that may not change cannot absorb either."""
    if absorber.site is None:
        return absorber
    found = next(found for found in index.values() if found.site.name == absorber.site)
    reason = _unscalable(found)
    return NoPath(reason) if reason else absorber
