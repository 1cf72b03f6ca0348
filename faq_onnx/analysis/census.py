"""The census: everything that later stages need to know about a graph."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from faq_onnx.analysis.embeddings import find_embeddings
from faq_onnx.analysis.family import match_family
from faq_onnx.analysis.groups import FoundGroup, find_groups
from faq_onnx.analysis.linear_sites import FoundSite, find_linear_sites, find_skipped
from faq_onnx.analysis.operands import all_nodes, constant, is_op
from faq_onnx.analysis.roles import group_role, layers_from_topology, roles_from_topology
from faq_onnx.artifacts.sites import (
    GroupRole,
    LinearRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
    SkippedWeight,
)
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.passes.rotate import ROTATED_KEY

__all__ = ["take_census"]

logger = logging.getLogger(__name__)

_QUANTIZED_OPS = (
    "MatMulNBits",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
    "QMoE",
    "QAttention",
    "ConvInteger",
    "QLinearConv",
)
_LISTED = 5  # names in an error message


def take_census(model: ir.Model, config: Mapping[str, object] | None = None) -> ModelCensus:
    """Find linear sites, embeddings, scale groups and absorbers; say what is left alone.

    Args:
        model: As `graph.io.load_model` and `canonicalise` leave it; not changed.
        config: Parsed config.json, where there is one.

    Raises:
        UnsupportedModelError: Already quantized, or nothing to quantize.
    """
    _refuse_quantized(model)
    found = find_linear_sites(model)
    embeddings = find_embeddings(model, found)
    handled = {site.site.output for site in found} | {table.output for table in embeddings}
    skipped = find_skipped(model, handled)
    if not found:
        raise UnsupportedModelError(_nothing_to_do(skipped))
    groups = find_groups(found, _head_dim(config))
    warnings: list[str] = []
    sites = _with_roles(found, groups, warnings)
    family = match_family(model, config, list(sites.values()), embeddings)
    warnings += [family.warning] if family.warning else []
    layers = {site.layer_index for site in sites.values() if site.layer_index is not None}
    census = ModelCensus(
        family=family.name,
        layer_count=max(layers, default=-1) + 1,
        sites=tuple(sites.values()),
        groups=_named_groups(groups, sites),
        embeddings=tuple(embeddings),
        skipped=tuple(skipped),
        warnings=tuple(warnings),
        rotation=model.metadata_props.get(ROTATED_KEY, ""),
    )
    logger.info(
        "%s: %d linear sites in %d layers, %d scale groups, %d weights left alone",
        census.family,
        len(census.sites),
        census.layer_count,
        len(census.groups),
        len(census.skipped),
    )
    return census


def _refuse_quantized(model: ir.Model) -> None:
    quantized = [node for node in all_nodes(model) if _is_quantized(node)]
    if quantized:
        names = ", ".join(f"{node.op_type} {node.name!r}" for node in quantized[:_LISTED])
        more = f" and {len(quantized) - _LISTED} more" if len(quantized) > _LISTED else ""
        raise UnsupportedModelError(
            f"the model is already quantized: {names}{more}; start from the float model"
        )


def _is_quantized(node: ir.Node) -> bool:
    if is_op(node, *_QUANTIZED_OPS):
        return True
    if not is_op(node, "DequantizeLinear"):
        return False
    weight = constant(node.inputs[0])
    return weight is not None and len(weight.shape) >= 2


def _nothing_to_do(skipped: Sequence[SkippedWeight]) -> str:
    reasons = "; ".join(f"{weight.node!r}: {weight.reason}" for weight in skipped[:_LISTED])
    listed = f" Left alone: {reasons}." if reasons else ""
    return (
        "the model has no linear layer (MatMul or Gemm with a constant float weight) that can be "
        f"quantized.{listed} Give a float language model exported to ONNX"
    )


def _head_dim(config: Mapping[str, object] | None) -> int | None:
    if config is None:
        return None
    given = config.get("head_dim")
    if isinstance(given, int) and given > 0:
        return given
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
        return hidden // heads
    return None


def _with_roles(
    found: Sequence[FoundSite], groups: Sequence[FoundGroup], warnings: list[str]
) -> dict[str, LinearSite]:
    """Sites by name, with what their names do not tell filled in from the topology."""
    by_topology = roles_from_topology(groups)
    roles = {
        member.site.name: member.site.role
        if member.site.role is not LinearRole.OTHER
        else by_topology.get(member.site.name, LinearRole.OTHER)
        for member in found
    }
    guessed = [member for member in found if roles[member.site.name] is not member.site.role]
    if guessed:
        warnings.append(
            f"{len(guessed)} linear layers have no telling names (first: "
            f"{guessed[0].site.name!r}); their roles were read off the graph"
        )
    layers = {member.site.name: member.site.layer_index for member in found}
    inner = [name for name, role in roles.items() if role not in _OUTSIDE_LAYERS]
    if inner and all(layers[name] is None for name in inner):
        layers = dict(layers_from_topology(groups, roles))
        warnings.append("no names tell the layers; they were counted in graph order")
    update = {
        member.site.name: {
            "role": roles[member.site.name],
            "layer_index": layers[member.site.name],
        }
        for member in found
    }
    return {
        member.site.name: member.site.model_copy(update=update[member.site.name])
        for member in found
    }


_OUTSIDE_LAYERS = (LinearRole.LM_HEAD, LinearRole.OTHER)


def _named_groups(
    groups: Sequence[FoundGroup], sites: Mapping[str, LinearSite]
) -> tuple[ScaleGroup, ...]:
    named = []
    taken: Counter[str] = Counter()
    for group in groups:
        members = [sites[member.site.name] for member in group.members]
        role = group_role([site.role for site in members])
        name = _group_name(role, members)
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}.{taken[name]}"
        named.append(
            ScaleGroup(
                name=name,
                role=role,
                layer_index=members[0].layer_index,
                input=group.input,
                in_features=members[0].in_features,
                sites=tuple(site.name for site in members),
                absorber=group.absorber,
                reason=group.reason,
                scalable=group.scalable,
            )
        )
    return tuple(named)


def _group_name(role: GroupRole, members: Sequence[LinearSite]) -> str:
    if role is GroupRole.OTHER:
        return f"other.{members[0].name}"
    layer = members[0].layer_index
    return role.value if layer is None else f"layers.{layer}.{role.value}"
