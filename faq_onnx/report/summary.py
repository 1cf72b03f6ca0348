"""The human summary in the output folder: what was done, how good it is, how to run it."""

from __future__ import annotations

from collections.abc import Sequence

from faq_onnx.artifacts.run import RunReport, SiteRow
from faq_onnx.artifacts.verification import VerificationReport
from faq_onnx.config import Axes, QuantizeConfig, Scales
from faq_onnx.report.rows import count_formats, curve_rows
from faq_onnx.report.tables import (
    format_bits,
    format_bytes,
    format_duration,
    storage_note,
    worst_sites,
)

__all__ = ["SUMMARY_NAME", "summary_markdown"]

SUMMARY_NAME = "summary.md"  # not README.md: that of the source model is copied

FINE_BITS = 8  # from here on blocks keep their range and weights go to the nearest level

_SCALES = {
    "none": "none",
    "awq": "from the activations that each layer reads (AWQ)",
    "faq": "from the activations that each layer and later ones read (FAQ)",
}
_GRIDS = {
    "minmax": "the range of each block",
    "clip": "the range of each block, cut where that lowers the output error (AWQ)",
    "search": "scale and zero point searched for the least output error",
    "hqq": "zero points that minimise a sparse error of the weights (HQQ)",
    "k-quant": "scale and zero point by weighted least squares on the weights (k-quant)",
}
_ROUNDINGS = {
    "nearest": "each weight to its nearest level",
    "gptq": "each weight makes up for the errors of those before it (GPTQ), then codes and "
    "scales are fitted in turn",
}
_FOR_PROGRAMS = "`report.json` has everything in this page, and more, for programs."


def summary_markdown(report: RunReport, usage: str) -> str:
    """Render the summary page of one run.

    Args:
        report: What was done.
        usage: How the target's runtime runs the folder, in Markdown.
    """
    parts = [
        _head(report),
        _done(report),
        _quality(report.verification),
        _budget(report),
        _worst(report.sites),
        _float_sites(report.sites),
        _bullets("Left alone", [f"`{weight}`: {reason}" for weight, reason in report.skipped]),
        _bullets("Warnings", report.warnings),
        f"## Run it\n\n{usage}\n\n{_FOR_PROGRAMS}",
        _timing(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: RunReport) -> str:
    totals = report.totals
    return (
        f"# {report.source}, {_method_name(report.config)} {_width(report.config)}\n\n"
        f"Made by faq-onnx {report.faq_onnx}. "
        f"{format_bytes(totals.source_bytes)} became {format_bytes(totals.output_bytes)}, "
        f"{totals.bits_per_weight:.2f} bits per weight over all linear layers and embeddings."
    )


def _method_name(config: QuantizeConfig) -> str:
    return config.method.value.upper()


def _width(config: QuantizeConfig) -> str:
    if config.same_size:
        return f"in the size of {config.bits}-bit"
    return f"{config.bits}-bit" if config.budget is None else f"under {config.budget}"


def _done(report: RunReport) -> str:
    config, totals = report.config, report.totals
    form = "symmetric" if config.symmetric else "asymmetric"
    if config.budget is not None and not config.symmetric:
        form = "zero points where they pay"
    lines = [
        f"Model family: {report.family}",
        f"{totals.quantized_sites} linear layers quantized, {totals.float_sites} kept float",
        f"{_formats(config)}, {form}",
        f"accuracy_level {config.accuracy_level}, lm_head {_head_format(config)}",
    ]
    note = storage_note(report.sites)
    if note:
        lines.append(f"**{note}**")
    if config.axes.calibrates:
        data = config.calibration
        lines.append(
            f"Calibrated on `{data.source}`: {report.calibration_tokens:,} tokens in windows of "
            f"up to {data.sequence_length}, seed {data.seed}"
        )
    lines += [*_choices(config, report.channel_scales), *_shrinkage(report.sites)]
    lines += [
        f"Embedding `{row.embedding}`: {format_bits(row.storage_bits, row.storage_bits)}"
        + (f", one buffer with `{row.shared_with}`" if row.shared_with else "")
        + (f" ({row.reason})" if row.reason else "")
        for row in report.embeddings
    ]
    return _bullets("What was done", lines)


def _formats(config: QuantizeConfig) -> str:
    scales = "" if config.block_scales == "float" else f", block scales in {config.block_scales}"
    codes = f"{config.bits}-bit codes, blocks of {config.block_size}"
    if config.budget is None:
        return codes + scales
    within = f"the size of {codes}" if config.same_size else f"a budget of {config.budget}"
    return f"2, 4 and 8 bits mixed within {within}{scales}"


def _head_format(config: QuantizeConfig) -> str:
    return config.lm_head if config.budget is None or config.lm_head == "keep" else "mixed in"


def _choices(config: QuantizeConfig, scales: Scales | None) -> list[str]:
    """What each axis of the method means, in words; `scales` where the text chose them."""
    axes = config.axes
    taken = scales or axes.scales
    lines = [f"Channel scales: {_SCALES[taken]}"]
    if taken != axes.scales:
        lines[0] += f"; the text is short for `--scales {axes.scales}`"
    if taken == "faq":
        faq = config.faq
        lines.append(
            f"FAQ: {faq.preview} preview over {faq.window} layers, fusion {faq.fusion:g}, "
            f"normalisation {faq.normalisation}, roles {', '.join(faq.roles)}"
        )
    if config.budget is None and config.bits >= FINE_BITS:
        axes = Axes(axes.scales, "minmax", "nearest")
    lines += [f"Block grids: {_GRIDS[axes.grid]}", f"Rounding: {_ROUNDINGS[axes.rounding]}"]
    if axes.judges:
        lines.append(f"Errors weighed on activations of {_path(config)}")
    return lines


def _path(config: QuantizeConfig) -> str:
    rounding = config.rounding
    if config.axes.path == "float":
        return "the float model"
    made_up = "each site makes up for errors before it" if rounding.correct else "not made up for"
    share = "all" if config.path_share == 1 else f"at least {config.path_share:.0%}"
    return f"the model quantized so far ({share} of the windows); {made_up}"


def _shrinkage(sites: Sequence[SiteRow]) -> list[str]:
    """What grids and rounding believed of correlations, where they looked at any."""
    found = [row.shrinkage for row in sites if row.shrinkage is not None]
    if not found:
        return []
    least, most = min(found), max(found)
    value = f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}"
    return [f"Correlations between activations shrunk by {value} (`--shrinkage`)"]


def _quality(verification: VerificationReport | None) -> str:
    if verification is None:
        return "## Quality\n\nNot measured."
    rows = []
    if verification.logits is not None:
        logits = verification.logits
        rows += [
            f"| KL divergence to the source model | {logits.kl_nats:.4f} nats/token |",
            f"| top-1 agreement | {logits.top1_agreement:.1%} |",
            f"| perplexity | {logits.perplexity:.3f} |",
            f"| perplexity of the source model | {logits.perplexity_float:.3f} |",
            f"| tokens compared | {logits.tokens} |",
        ]
    kernels, structure = verification.kernels, verification.structure
    if kernels is not None:
        share = f"{kernels.worst:.3g} ({kernels.nodes} nodes)"
        rows.append(f"| kernel error, share of its tolerance | {share} |")
    if structure is not None:
        slow = f"{len(structure.slow_nodes)} of {structure.nbits_nodes}"
        rows.append(f"| nodes on a slow path | {slow} |")
    if verification.fold_error is not None:
        rows.append(f"| scale folding, float error | {verification.fold_error:.3g} |")
    if verification.attention is not None:
        rows.append(f"| attention | {verification.attention.text} |")
    if verification.proof is not None:
        name, tried = verification.proof.target, verification.proof.checks
        rows += [f"| {name}: {check.name} | {check.value} |" for check in tried]
    table = "\n".join(["| measure | value |", "|---|---|", *rows])
    notes = "\n".join(f"- {text}" for text in verification.notes)
    return "\n\n".join(part for part in ("## Quality", table, notes) if part)


def _budget(report: RunReport) -> str:
    """What the budget could have bought, and what it bought."""
    trade_off = report.trade_off
    if trade_off is None:
        return ""
    points = [
        f"| {format_bytes(point.bytes)} | {point.bits_per_weight:.2f} | {point.kl:.4g} "
        f"| {'**chosen**' if chosen else ''} |"
        for point, chosen in curve_rows(trade_off)
    ]
    counted = count_formats((row.code_bits, row.block_size) for row in report.sites)
    counts = [f"| {number} | {name} |" for name, number in counted]
    titles = "| file, at most | bits per weight | predicted KL, nats/token | |"
    parts = [
        f"## Budget {trade_off.budget}",
        "\n".join([titles, "|---|---|---|---|", *points]),
        "\n".join(["| linear layers | format |", "|---|---|", *counts]),
    ]
    logits = None if report.verification is None else report.verification.logits
    if logits is not None:
        parts.append(
            f"KL predicted {trade_off.chosen.kl:.4g}, measured {logits.kl_nats:.4g} nats/token."
        )
    return "\n\n".join(parts)


def _worst(sites: Sequence[SiteRow]) -> str:
    worst = worst_sites(sites)
    if not worst:
        return ""
    lines = [
        f"| `{row.site}` | {format_bits(row.code_bits, row.storage_bits)} | {row.sqnr_db:.1f} dB |"
        for row in worst
    ]
    table = "\n".join(["| site | bits | SQNR of its output |", "|---|---|---|", *lines])
    hint = "`--exclude` keeps a site float."
    return f"## Worst sites\n\n{table}\n\n{hint}"


def _float_sites(sites: Sequence[SiteRow]) -> str:
    kept = [f"`{row.site}`: {row.reason}" for row in sites if row.storage_bits is None]
    return _bullets("Kept float", kept)


def _bullets(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)


def _timing(report: RunReport) -> str:
    lines = [f"{time.stage}: {format_duration(time.duration_s)}" for time in report.stages]
    if report.peak_rss_bytes is not None:
        lines.append(f"Peak memory: {format_bytes(report.peak_rss_bytes)}")
    lines += [f"{name} {version}" for name, version in sorted(report.versions.items())]
    return _bullets("How it was made", lines)
