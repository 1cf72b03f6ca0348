"""Rows of the plan and report tables, from the artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan, GroupPlan, QuantPlan, SitePlan
from faq_onnx.artifacts.run import EmbeddingRow, SiteRow, Totals
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus
from faq_onnx.artifacts.trade_off import TradeOff, TradeOffPoint
from faq_onnx.artifacts.verification import SiteError

__all__ = [
    "count_formats",
    "curve_rows",
    "embedding_rows",
    "make_totals",
    "site_rows",
    "weight_bytes",
]

_DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def weight_bytes(rows: int, columns: int, dtype: str, fmt: BlockFormat | None) -> int:
    """Bytes that a weight [rows, columns] takes: codes, scales and zero points."""
    if fmt is None:
        return rows * columns * _DTYPE_BYTES[dtype]
    return fmt.weight_bytes(rows, columns, 2 if dtype == "float16" else 4)


def site_rows(
    census: ModelCensus, plan: QuantPlan, errors: Mapping[str, SiteError]
) -> tuple[SiteRow, ...]:
    """One row per linear site."""
    groups = {name: group.name for group in census.groups for name in group.sites}
    decided = {group.group: group for group in plan.groups}
    plans = {site.site: site for site in plan.sites}
    return tuple(
        _site_row(site, plans[site.name], decided.get(groups[site.name]), errors.get(site.name))
        for site in census.sites
    )


def embedding_rows(census: ModelCensus, plan: QuantPlan) -> tuple[EmbeddingRow, ...]:
    """One row per embedding; a shared table costs nothing here, its head pays."""
    plans = {table.embedding: table for table in plan.embeddings}
    return tuple(_embedding_row(table, plans[table.name]) for table in census.embeddings)


def make_totals(
    sites: tuple[SiteRow, ...],
    embeddings: tuple[EmbeddingRow, ...],
    *,
    source_bytes: int,
    output_bytes: int,
) -> Totals:
    """Sums over the tables, and the sizes of both files."""
    weights = sum(row.in_features * row.out_features for row in sites)
    weights += sum(row.rows * row.width for row in embeddings if row.shared_with is None)
    size = sum(row.size_bytes for row in sites) + sum(row.size_bytes for row in embeddings)
    low_bit = sum(row.storage_bits is not None for row in sites)
    return Totals(
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        quantized_sites=low_bit,
        float_sites=len(sites) - low_bit,
        bits_per_weight=round(8 * size / weights, 4) if weights else 0.0,
    )


def curve_rows(trade_off: TradeOff, count: int = 8) -> list[tuple[TradeOffPoint, bool]]:
    """Points of the curve that are about evenly spaced in size, and the choice (True)."""
    curve = trade_off.curve
    step = (curve[-1].bytes - curve[0].bytes) / max(count - 1, 1)
    picked = {
        min(curve, key=lambda point: abs(point.bytes - curve[0].bytes - step * number))
        for number in range(count)
    }
    rows = [(point, False) for point in picked if point.bytes != trade_off.chosen.bytes]
    return sorted([*rows, (trade_off.chosen, True)], key=lambda row: (row[0].bytes, row[1]))


def count_formats(formats: Iterable[tuple[int | None, int | None]]) -> list[tuple[str, int]]:
    """How many sites have each (code bits, block size), fewest bits first, float last."""
    counted = Counter(formats)
    return [
        ("float" if bits is None else f"{bits} bits, blocks of {block}", counted[bits, block])
        for bits, block in sorted(counted, key=lambda key: (key[0] or 99, key[1] or 0))
    ]


def _site_row(
    site: LinearSite, plan: SitePlan, group: GroupPlan | None, error: SiteError | None
) -> SiteRow:
    fmt = plan.format
    return SiteRow(
        site=site.name,
        layer_index=site.layer_index,
        role=site.role.value,
        in_features=site.in_features,
        out_features=site.out_features,
        code_bits=None if fmt is None else fmt.code_bits,
        storage_bits=None if fmt is None else fmt.storage_bits,
        block_size=None if fmt is None else fmt.block_size,
        symmetric=fmt is not None and fmt.symmetric,
        size_bytes=weight_bytes(site.out_features, site.in_features, site.dtype, fmt),
        channel_scale="none" if group is None else group.application.value,
        exponent=0.0 if group is None else group.exponent,
        sqnr_db=None if error is None else error.sqnr_db,
        shrinkage=None if error is None else error.shrinkage,
        reason=plan.reason,
    )


def _embedding_row(table: EmbeddingSite, plan: EmbeddingPlan) -> EmbeddingRow:
    size = weight_bytes(table.rows, table.width, table.dtype, plan.format)
    return EmbeddingRow(
        embedding=table.name,
        rows=table.rows,
        width=table.width,
        storage_bits=None if plan.format is None else plan.format.storage_bits,
        shared_with=plan.shared_with,
        size_bytes=0 if plan.shared_with is not None else size,
        reason=plan.reason,
    )
