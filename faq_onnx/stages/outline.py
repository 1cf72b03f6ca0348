"""What limits of targets look at: a planned model, or a finished one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite
from faq_onnx.artifacts.target import ModelOutline, OperatorUse, PlannedWeight
from faq_onnx.config import BlockScales
from faq_onnx.quant.stored_scales import LPBQ_MULTIPLES
from faq_onnx.report.rows import weight_bytes
from faq_onnx.stages.fusing import rotary_table_bytes
from faq_onnx.stages.opening import OpenedModel
from faq_onnx.verify.nodes import MATMUL, LowBitNode, low_bit_nodes

__all__ = ["outline_of_model", "outline_of_plan", "planned_weight"]

BIAS_INPUT = 5  # of MatMulNBits


def outline_of_plan(
    opened: OpenedModel,
    sites: Sequence[SitePlan],
    embeddings: Sequence[EmbeddingPlan],
    *,
    fuse_attention: bool,
) -> ModelOutline:
    """What a conversion will write.

    Args:
        opened: The float model.
        sites: One for each of its sites.
        embeddings: One for each of its embeddings.
        fuse_attention: Tables of rotation will be added.
    """
    plans = {plan.site: plan for plan in sites}
    tables = {plan.embedding: plan for plan in embeddings}
    census = opened.census
    linear = [_planned_site(site, plans[site.name]) for site in census.sites]
    looked_up = [_planned_table(table, tables[table.name]) for table in census.embeddings]
    small = any(plan.format is not None and plan.format.block_scales != "float" for plan in sites)
    size = opened.other_bytes("8-bit" if small else "float", external=False)
    floats: dict[str, int] = {}  # a float table and its tied head are one initializer
    shared = {plan.embedding for plan in embeddings if plan.shared_with is not None}
    stored: list[LinearSite | EmbeddingSite] = [*census.sites, *census.embeddings]
    for site, weight in zip(stored, (*linear, *looked_up), strict=True):
        if weight.format is None:
            floats[site.weight] = _size(weight)
        elif weight.place not in shared:
            size += _size(weight)
    size += sum(floats.values())
    if fuse_attention:
        size += rotary_table_bytes(opened.model, opened.source)
    return ModelOutline(
        weights=(*linear, *looked_up),
        model_bytes=size,
        inputs=_inputs(opened.model),
        operators=_operators(opened.model),
    )


def outline_of_model(model: ir.Model, model_bytes: int) -> ModelOutline:
    """What a model of that size holds now; of its weights, those in low bits."""
    nodes = {
        node.name or node.outputs[0].name: node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    }
    weights = tuple(_finished(node, nodes[node.name]) for node in low_bit_nodes(model))
    return ModelOutline(
        weights=weights,
        model_bytes=model_bytes,
        inputs=_inputs(model),
        operators=_operators(model),
    )


def _inputs(model: ir.Model) -> tuple[str, ...]:
    return tuple(value.name or "" for value in model.graph.inputs)


def _operators(model: ir.Model) -> tuple[OperatorUse, ...]:
    nodes: dict[tuple[str, str], list[ir.Node]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        nodes.setdefault((node.domain, node.op_type), []).append(node)
    return tuple(
        OperatorUse(
            op_type=op_type,
            domain=domain,
            first=alike[0].name or alike[0].outputs[0].name or op_type,
            count=len(alike),
        )
        for (domain, op_type), alike in nodes.items()
    )


def _planned_site(site: LinearSite, plan: SitePlan) -> PlannedWeight:
    weight = planned_weight(site, plan.format)
    return weight.model_copy(update={"accuracy_level": plan.accuracy_level})


def _planned_table(table: EmbeddingSite, plan: EmbeddingPlan) -> PlannedWeight:
    return planned_weight(table, plan.format)


def planned_weight(site: LinearSite | EmbeddingSite, fmt: BlockFormat | None) -> PlannedWeight:
    """A weight as targets look at it, in that format; None is float."""
    is_linear = isinstance(site, LinearSite)
    return PlannedWeight(
        place=site.name,
        kind="linear" if is_linear else "embedding",
        rows=site.out_features if isinstance(site, LinearSite) else site.rows,
        width=site.in_features if isinstance(site, LinearSite) else site.width,
        dtype=site.dtype,
        format=fmt,
    )


def _finished(found: LowBitNode, node: ir.Node) -> PlannedWeight:
    spec, is_linear = found.spec, found.op_type == MATMUL
    bias = node.inputs[BIAS_INPUT] if is_linear and len(node.inputs) > BIAS_INPUT else None
    return PlannedWeight(
        place=found.name,
        kind="linear" if is_linear else "embedding",
        rows=found.rows,
        width=spec.in_features,
        dtype=spec.scale_dtype,
        format=BlockFormat(
            code_bits=spec.bits,
            storage_bits=spec.bits,
            block_size=spec.block_size,
            symmetric=not spec.zero_point_dtype,
            block_scales=_block_scales(found),
        ),
        accuracy_level=spec.accuracy_level,
        float_zero_points=spec.zero_point_dtype not in {"", "uint8"},
        has_bias=bias is not None,
    )


def _size(weight: PlannedWeight) -> int:
    return weight_bytes(weight.rows, weight.width, weight.dtype, weight.format)


def _block_scales(found: LowBitNode) -> BlockScales:
    """By the integers in the file."""
    largest = found.largest_multiple
    if largest is None:
        return "float"
    is_lpbq = found.spec.bits == 4 and not found.spec.zero_point_dtype
    return "lpbq" if is_lpbq and largest <= LPBQ_MULTIPLES else "8-bit"
