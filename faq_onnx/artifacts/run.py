"""The record of one conversion: report.json."""

from __future__ import annotations

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.trade_off import TradeOff
from faq_onnx.artifacts.verification import VerificationReport
from faq_onnx.config import QuantizeConfig, Scales

__all__ = ["EmbeddingRow", "RunReport", "SiteRow", "StageTime", "Totals"]


class SiteRow(Record):
    """One linear site in the plan and report tables."""

    site: str
    layer_index: int | None
    role: str
    in_features: int
    out_features: int
    code_bits: int | None
    storage_bits: int | None
    block_size: int | None
    symmetric: bool
    size_bytes: int
    channel_scale: str
    exponent: float
    sqnr_db: float | None
    shrinkage: float | None = None
    reason: str


class EmbeddingRow(Record):
    """One embedding table."""

    embedding: str
    rows: int
    width: int
    storage_bits: int | None
    shared_with: str | None
    size_bytes: int
    reason: str


class StageTime(Record):
    """Wall-clock seconds of one stage."""

    stage: str
    duration_s: float


class Totals(Record):
    """Sizes in bytes, bits per weight over all linear sites and embeddings."""

    source_bytes: int
    output_bytes: int
    quantized_sites: int
    float_sites: int
    bits_per_weight: float


class RunReport(Record):
    """Everything about one run.

    Attributes:
        versions: By package name.
        calibration_tokens: Tokens that statistics and rounding looked at; 0 for methods that look
            at weights only.
        channel_scales: Statistic that they were chosen by: on a short text not the one that
            `config` asks for. None in reports of earlier builds.
        peak_rss_bytes: None where the system does not tell, which is Windows.
    """

    schema_version: int = 1
    faq_onnx: str
    source: str
    family: str
    config: QuantizeConfig
    fingerprints: dict[str, str]
    versions: dict[str, str]
    sites: tuple[SiteRow, ...]
    embeddings: tuple[EmbeddingRow, ...]
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    totals: Totals
    stages: tuple[StageTime, ...]
    peak_rss_bytes: int | None
    verification: VerificationReport | None
    trade_off: TradeOff | None = None
    calibration_tokens: int = 0
    channel_scales: Scales | None = None
