"""The record of a conversion: report.json and summary.md."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from faq_onnx.artifacts.run import RunReport, StageTime
from faq_onnx.artifacts.verification import VerificationReport
from faq_onnx.config import QuantizeConfig
from faq_onnx.planning.planner import PlannedModel
from faq_onnx.report.rows import embedding_rows, make_totals, site_rows
from faq_onnx.report.summary import summary_markdown
from faq_onnx.stages.opening import OpenedModel

if sys.platform != "win32":
    import resource

__all__ = ["REPORT_NAME", "SUMMARY_NAME", "make_report", "write_report"]

REPORT_NAME = "report.json"
SUMMARY_NAME = "summary.md"
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers")


def make_report(  # noqa: PLR0913 - one argument per source of a field
    opened: OpenedModel,
    planned: PlannedModel,
    verification: VerificationReport,
    *,
    config: QuantizeConfig,
    times: Sequence[StageTime],
    totals: tuple[int, int],
    calibration_tokens: int,
) -> RunReport:
    """Everything about one conversion; `totals` are the bytes of source and output."""
    errors = {site.site: site for site in verification.sites}
    sites = site_rows(opened.census, planned.plan, errors)
    tables = embedding_rows(opened.census, planned.plan)
    return RunReport(
        faq_onnx=importlib.metadata.version("faq-onnx"),
        source=opened.source.given,
        family=opened.census.family,
        config=config,
        fingerprints={
            "model": opened.given.fingerprint,
            "census": opened.census.fingerprint(),
            "plan": planned.plan.fingerprint(),
        },
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        sites=sites,
        embeddings=tables,
        skipped=tuple((weight.node, weight.reason) for weight in opened.census.skipped),
        warnings=opened.census.warnings,
        totals=make_totals(sites, tables, source_bytes=totals[0], output_bytes=totals[1]),
        stages=tuple(times),
        peak_rss_bytes=_peak_rss_bytes(),
        verification=verification,
        trade_off=planned.plan.trade_off,
        calibration_tokens=calibration_tokens,
        channel_scales=planned.plan.channel_scales or config.axes.scales,
    )


def write_report(report: RunReport, folder: Path, usage: str) -> None:
    """Write report.json, and summary.md for people, with how to run the folder."""
    report.save(folder / REPORT_NAME)
    (folder / SUMMARY_NAME).write_text(summary_markdown(report, usage), encoding="utf-8")


def _peak_rss_bytes() -> int | None:
    """The most memory that this process had resident; None on Windows, which does not tell."""
    if sys.platform != "win32":  # the form that type checkers of either system understand
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
