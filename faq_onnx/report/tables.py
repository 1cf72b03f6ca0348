"""Plain text tables of plans, censuses and results, as wide as their content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import GroupPlan, QuantPlan
from faq_onnx.artifacts.run import EmbeddingRow, RunReport, SiteRow, Totals
from faq_onnx.artifacts.sites import EmbeddingSite, ModelCensus, ScaleGroup
from faq_onnx.artifacts.target import FactTable, Refusal, TargetProof
from faq_onnx.artifacts.trade_off import TradeOff
from faq_onnx.artifacts.verification import VerificationReport
from faq_onnx.report.rows import count_formats, curve_rows

__all__ = [
    "census_text",
    "fact_text",
    "format_bits",
    "format_bytes",
    "format_duration",
    "package_text",
    "plan_text",
    "proof_text",
    "quant_plan_text",
    "refusals_text",
    "render_table",
    "result_text",
    "storage_note",
    "trade_off_text",
    "verification_text",
    "worst_sites",
]


def render_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned by content; columns that hold only numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max([len(title), *(len(row[column]) for row in cells)])
        for column, title in enumerate(header)
    ]
    right = [
        bool(cells) and all(row[column][:1].isdigit() or row[column] in {"", "-"} for row in cells)
        for column in range(len(header))
    ]
    lines = [_line(header, widths, right), "  ".join("-" * width for width in widths)]
    lines += [_line(row, widths, right) for row in cells]
    return "\n".join(lines)


def format_bytes(size: int) -> str:
    """Decimal units, as file managers and model hubs count: "134.5 MB"."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Seconds as "0.4 s", "12 s" or "3m 05s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s"


def format_bits(code_bits: int | None, storage_bits: int | None) -> str:
    """Width of a weight: "4", "3 in 4" where codes are stored wider than they are, "float"."""
    if storage_bits is None:
        return "float"
    if code_bits is not None and code_bits != storage_bits:
        return f"{code_bits} in {storage_bits}"
    return str(storage_bits)


def storage_note(rows: Iterable[SiteRow]) -> str:
    """A sentence on every width that is stored wider than its codes, "" if there is none."""
    pairs = {
        (row.code_bits, row.storage_bits)
        for row in rows
        if row.storage_bits is not None and row.code_bits not in {None, row.storage_bits}
    }
    return "; ".join(
        f"{code}-bit codes in {storage}-bit storage: the file is as large as with {storage} bits"
        for code, storage in sorted(pairs, key=str)
    )


def plan_text(rows: Sequence[SiteRow], embeddings: Sequence[EmbeddingRow], totals: Totals) -> str:
    """What `--dry-run` shows."""
    scaled = any(row.channel_scale != "none" for row in rows)  # a dry run has not decided yet
    header = ["layer", "role", "site", "K", "N", "bits", "block", "bytes", "note"]
    sites = render_table(
        [*header, "scale"] if scaled else header,
        [
            (
                "-" if row.layer_index is None else row.layer_index,
                row.role,
                row.site,
                row.in_features,
                row.out_features,
                format_bits(row.code_bits, row.storage_bits),
                "-" if row.block_size is None else row.block_size,
                row.size_bytes,
                row.reason,
                *([row.channel_scale] if scaled else []),
            )
            for row in rows
        ],
    )
    parts = [sites, _embedding_rows(embeddings), _totals(totals), storage_note(rows)]
    return "\n\n".join(part for part in parts if part)


def quant_plan_text(plan: QuantPlan) -> str:
    """What `plan` shows: the channel scale of each group and what it gains."""
    quantized = sum(site.format is not None for site in plan.sites)
    head = f"method {plan.method}, {quantized} of {len(plan.sites)} linear sites quantized"
    if plan.trade_off is not None:
        found = [site.format for site in plan.sites]
        formats = ((f.code_bits, f.block_size) if f else (None, None) for f in found)
        head += f"\n\n{trade_off_text(plan.trade_off, formats)}"
    if not plan.groups:
        return head
    rows = [(g.group, g.application.value, f"{g.exponent:.2f}", _gain(g)) for g in plan.groups]
    table = render_table(("scale group", "channel scale", "exponent", "error left"), rows)
    return f"{head}\n\n{table}"


def census_text(census: ModelCensus) -> str:
    """What `inspect` shows: sites, scale groups, embeddings, and what stays as it is."""
    head = (
        f"family {census.family}, {census.layer_count} layers, {len(census.sites)} linear sites, "
        f"{len(census.embeddings)} embeddings, {len(census.skipped)} weights left alone"
    )
    sites = render_table(
        ("layer", "role", "site", "op", "K", "N", "dtype"),
        [
            (
                "-" if site.layer_index is None else site.layer_index,
                site.role.value,
                site.name,
                site.op_type,
                site.in_features,
                site.out_features,
                site.dtype,
            )
            for site in census.sites
        ],
    )
    groups = render_table(
        ("scale group", "K", "sites", "channel scale goes into"),
        [(g.name, g.in_features, len(g.sites), _absorber(g)) for g in census.groups],
    )
    embeddings = render_table(
        ("embedding", "rows", "width", "dtype", "tied to"),
        [(e.name, e.rows, e.width, e.dtype, _tie(e)) for e in census.embeddings],
    )
    skipped = render_table(
        ("left alone", "op", "weight", "shape", "reason"),
        [
            (s.node, s.op_type, s.weight, "x".join(map(str, s.shape)), s.reason)
            for s in census.skipped
        ],
    )
    parts = [head, sites if census.sites else "", groups if census.groups else ""]
    parts += [embeddings if census.embeddings else "", skipped if census.skipped else ""]
    parts += [f"warning: {text}" for text in census.warnings]
    return "\n\n".join(part for part in parts if part)


def result_text(report: RunReport) -> str:
    """What `convert` shows at the end."""
    parts = [_totals(report.totals), storage_note(report.sites)]
    if report.trade_off is not None:
        formats = ((row.code_bits, row.block_size) for row in report.sites)
        parts.insert(0, trade_off_text(report.trade_off, formats) + "\n")
    if report.verification is not None:
        parts.append(verification_text(report.verification))
    parts += [f"warning: {text}" for text in report.warnings]
    return "\n".join(part for part in parts if part)


def trade_off_text(trade_off: TradeOff, formats: Iterable[tuple[int | None, int | None]]) -> str:
    """What a budget could have bought, what it bought, and the (bits, block) of the sites."""
    points = render_table(
        ("file, at most", "bits per weight", "predicted KL", "budget"),
        [
            (
                format_bytes(point.bytes),
                f"{point.bits_per_weight:.2f}",
                f"{point.kl:.4g}",
                f"<- {trade_off.budget}" if chosen else "",
            )
            for point, chosen in curve_rows(trade_off)
        ],
    )
    counts = render_table(("sites", "format"), [(n, name) for name, n in count_formats(formats)])
    return f"{points}\n\n{counts}"


def verification_text(verification: VerificationReport) -> str:
    """Structure, numbers and logits in a few lines."""
    structure, kernels = verification.structure, verification.kernels
    lines = []
    if structure is not None:
        slow = len(structure.slow_nodes)
        lines.append(
            f"structure   IR {structure.ir_version}, opset {structure.opset}, onnxruntime "
            f"{structure.onnxruntime}, {structure.nbits_nodes} MatMulNBits nodes, "
            + (f"{slow} on a SLOW path" if slow else "none on a slow path")
        )
    if kernels is not None:
        worst = f"worst error {kernels.worst:.3g} of its tolerance"
        lines.append(f"kernels     {kernels.nodes} nodes, {worst}")
    if verification.logits is not None:
        logits = verification.logits
        lines += [
            f"KL          {logits.kl_nats:.4f} nats/token over {logits.tokens} tokens",
            f"top-1       {logits.top1_agreement:.1%} agreement with the source model",
            f"perplexity  {logits.perplexity:.3f} (source model {logits.perplexity_float:.3f})",
        ]
    if verification.attention is not None:
        lines.append(f"attention   {verification.attention.text}")
    if verification.proof is not None:
        lines.append(proof_text(verification.proof))
    lines += [f"changed     {text}" for text in verification.changes]
    lines += [f"note        {text}" for text in verification.notes]
    return "\n".join(lines)


def package_text(manifest: PackageManifest) -> str:
    """What packaging did, in a few lines."""
    lines = [f"model       {format_bytes(manifest.model_bytes)}"]
    if manifest.attention is not None:
        lines.append(f"attention   {manifest.attention.text}")
    lines.append(proof_text(manifest.proof))
    lines += [f"note        {text}" for text in manifest.notes]
    lines += [f"\n{fact_text(table)}" for table in manifest.tables]
    if manifest.usage:
        lines.append(f"\nTo run it:\n\n{manifest.usage}\n")
    return "\n".join(lines)


def proof_text(proof: TargetProof) -> str:
    """What the runtime of a target did: a line for each check, and what was measured."""
    words = {True: "", False: "FAILED: ", None: ""}
    lines = [
        f"{proof.target:<11} {check.name}: {words[check.passed]}{check.value}"
        for check in proof.checks
    ]
    lines += [f"\n{fact_text(table)}" for table in proof.tables]
    return "\n".join(lines)


def fact_text(table: FactTable) -> str:
    """A table of figures under its title."""
    return f"{table.title}\n{render_table(table.header, table.rows)}"


def refusals_text(target: str, refusals: Sequence[Refusal]) -> str:
    """What would not run on a target."""
    if not refusals:
        return f"{target}: nothing here is refused"
    rows = [(each.place, each.found, each.allowed, each.way_out) for each in refusals]
    return render_table((f"would not run on {target}", "found", "allowed", "way out"), rows)


def worst_sites(rows: Iterable[SiteRow], count: int = 5) -> list[SiteRow]:
    """The quantized sites with the lowest SQNR, worst first."""
    measured = [row for row in rows if row.sqnr_db is not None]
    return sorted(measured, key=lambda row: row.sqnr_db or 0.0)[:count]


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    )
    return "  ".join(aligned).rstrip()


def _embedding_rows(embeddings: Sequence[EmbeddingRow]) -> str:
    if not embeddings:
        return ""
    return render_table(
        ("embedding", "rows", "width", "bits", "buffer", "bytes", "note"),
        [
            (
                row.embedding,
                row.rows,
                row.width,
                format_bits(row.storage_bits, row.storage_bits),
                f"that of {row.shared_with}" if row.shared_with else "own",
                row.size_bytes,
                row.reason,
            )
            for row in embeddings
        ],
    )


def _totals(totals: Totals) -> str:
    ratio = totals.source_bytes / totals.output_bytes if totals.output_bytes else 0.0
    return (
        f"size        {format_bytes(totals.source_bytes)} -> {format_bytes(totals.output_bytes)} "
        f"({ratio:.1f} times smaller), {totals.bits_per_weight:.2f} bits per weight\n"
        f"sites       {totals.quantized_sites} quantized, {totals.float_sites} float"
    )


def _gain(group: GroupPlan) -> str:
    if not group.loss_identity or group.loss is None:
        return "-"
    return f"{group.loss / group.loss_identity:.1%}"


def _absorber(group: ScaleGroup) -> str:
    if group.absorber is None:
        return f"nothing: {group.reason}"
    return f"{group.absorber.kind.value} {group.absorber.site or group.absorber.initializer or ''}"


def _tie(embedding: EmbeddingSite) -> str:
    if embedding.tied_site is None or embedding.tie is None:
        return "-"
    return f"{embedding.tied_site} ({embedding.tie.value})"
