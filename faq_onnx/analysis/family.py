"""Which model family a graph belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from faq_onnx.analysis.operands import consumers, is_op, small_constant
from faq_onnx.artifacts.sites import EmbeddingSite, LinearRole, LinearSite
from faq_onnx.models import FAMILIES, ModelFamily

__all__ = ["FamilyMatch", "match_family"]

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class FamilyMatch:
    """Name of the family, and what had to be assumed for it ("" if nothing)."""

    name: str
    warning: str = ""


def match_family(
    model: ir.Model,
    config: Mapping[str, object] | None,
    sites: Sequence[LinearSite],
    embeddings: Sequence[EmbeddingSite],
) -> FamilyMatch:
    """By `model_type` of config.json, else by what the graph shows."""
    model_type = None if config is None else config.get("model_type")
    if isinstance(model_type, str):
        for family in FAMILIES:
            if model_type in family.model_types:
                return FamilyMatch(family.name)
        return FamilyMatch(
            UNKNOWN,
            f"model_type {model_type!r} is not among the known families "
            f"({', '.join(family.name for family in FAMILIES)}); roles, groups and absorbers are "
            "taken from the graph alone",
        )
    if not any(site.role is LinearRole.O_PROJ for site in sites):
        return FamilyMatch(UNKNOWN, "no attention layers found; taken as a plain graph")
    for family in FAMILIES:
        if _fits(family, model, sites, embeddings):
            return FamilyMatch(
                family.name,
                f"no config.json: family {family.name!r} assumed from the features of the graph",
            )
    return FamilyMatch(UNKNOWN, "no config.json and no family has the features of this graph")


def _fits(
    family: ModelFamily,
    model: ir.Model,
    sites: Sequence[LinearSite],
    embeddings: Sequence[EmbeddingSite],
) -> bool:
    # A builder may pack q, k and v of any family, so packing alone excludes nothing but phi3.
    packed_mlp = any(site.role is LinearRole.GATE_UP_PROJ for site in sites)
    return (
        family.qk_norm == _mentions(model, "q_norm")
        and family.qkv_bias == _has_qkv_bias(sites)
        and family.scaled_embedding == _scales_embedding(model, embeddings)
        and family.fused_projections == packed_mlp
    )


def _mentions(model: ir.Model, word: str) -> bool:
    if any(word in name for name in model.graph.initializers):
        return True
    return any(
        word in (node.name or "") or any(word in text for text in node.metadata_props.values())
        for node in model.graph
    )


def _has_qkv_bias(sites: Sequence[LinearSite]) -> bool:
    inputs = (LinearRole.Q_PROJ, LinearRole.QKV_PROJ)
    return any(site.role in inputs and site.bias is not None for site in sites)


def _scales_embedding(model: ir.Model, embeddings: Sequence[EmbeddingSite]) -> bool:
    outputs = {embedding.output for embedding in embeddings}
    for node in model.graph:
        if node.outputs[0].name not in outputs:
            continue
        for reader in consumers(node.outputs[0]):
            scalars = [small_constant(operand) for operand in reader.inputs]
            if is_op(reader, "Mul", domain="") and any(
                scalar is not None and scalar.size == 1 for scalar in scalars
            ):
                return True
    return False
