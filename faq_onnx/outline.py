"""What limits of targets look at: a planned model, or a finished one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import ModelOutline, OperatorUse, PlannedWeight
from faq_onnx.fuse_stages import rotary_table_bytes
from faq_onnx.report.rows import weight_bytes
from faq_onnx.run_report import source_bytes
from faq_onnx.stages import OpenedModel
from faq_onnx.verify.nodes import MATMUL, LowBitNode, low_bit_nodes

__all__ = ["outline_of_model", "outline_of_plan"]

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
    weights = [_planned_site(site, plans[site.name]) for site in opened.census.sites]
    own = [_planned_table(table, tables[table.name]) for table in opened.census.embeddings]
    small = any(plan.format is not None and plan.format.block_scales != "float" for plan in sites)
    size = opened.other_bytes("8-bit" if small else "float", external=False)
    size += sum(_size(weight) for weight in weights)
    shared = {plan.embedding for plan in embeddings if plan.shared_with is not None}
    size += sum(_size(weight) for weight in own if weight.place not in shared)
    if fuse_attention:
        size += rotary_table_bytes(opened.model, opened.source)
    return ModelOutline(
        weights=(*weights, *own),
        model_bytes=size,
        inputs=_inputs(opened.model),
        operators=_operators(opened.model),
    )


def outline_of_model(source: SourceModel, model: ir.Model) -> ModelOutline:
    """What a model holds now; of its weights, those in low bits."""
    biased = {
        node.name or node.outputs[0].name
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == MATMUL and len(node.inputs) > BIAS_INPUT and node.inputs[BIAS_INPUT]
    }
    weights = tuple(_finished(node, biased) for node in low_bit_nodes(model))
    return ModelOutline(
        weights=weights,
        model_bytes=source_bytes(source, model),
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
    weight = _weight(site, plan.format)
    return weight.model_copy(update={"accuracy_level": plan.accuracy_level})


def _planned_table(table: EmbeddingSite, plan: EmbeddingPlan) -> PlannedWeight:
    return _weight(table, plan.format)


def _weight(site: LinearSite | EmbeddingSite, fmt: BlockFormat | None) -> PlannedWeight:
    is_linear = isinstance(site, LinearSite)
    return PlannedWeight(
        place=site.name,
        kind="linear" if is_linear else "embedding",
        rows=site.out_features if isinstance(site, LinearSite) else site.rows,
        width=site.in_features if isinstance(site, LinearSite) else site.width,
        dtype=site.dtype,
        format=fmt,
    )


def _finished(node: LowBitNode, biased: set[str | None]) -> PlannedWeight:
    spec = node.spec
    return PlannedWeight(
        place=node.name,
        kind="linear" if node.op_type == MATMUL else "embedding",
        rows=node.rows,
        width=spec.in_features,
        dtype=spec.scale_dtype,
        format=BlockFormat(
            code_bits=spec.bits,
            storage_bits=spec.bits,
            block_size=spec.block_size,
            symmetric=not spec.zero_point_dtype,
        ),
        accuracy_level=spec.accuracy_level,
        float_zero_points=spec.zero_point_dtype not in {"", "uint8"},
        has_bias=node.name in biased,
    )


def _size(weight: PlannedWeight) -> int:
    return weight_bytes(weight.rows, weight.width, weight.dtype, weight.format)
