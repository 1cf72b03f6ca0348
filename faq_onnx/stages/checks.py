"""Verification of what was written, and the verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from faq_onnx.artifacts.trade_off import TradeOff
from faq_onnx.artifacts.verification import (
    LogitMetrics,
    SiteError,
    StructureCheck,
    VerificationReport,
)
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.config import METHODS, Method, QuantizeConfig
from faq_onnx.errors import VerificationError
from faq_onnx.progress import Progress
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.kernels import check_kernels
from faq_onnx.verify.logits import LogitComparison
from faq_onnx.verify.structure import check_structure

__all__ = [
    "budget_note",
    "compare_to_reference",
    "fold_error",
    "judge",
    "scales_note",
    "slow_note",
    "verify_file",
]

WORST_SITES = 5
KL_MARGIN = 0.95  # of what is asked for after a KL was not kept
# Folding multiplies and divides by the same numbers: what remains is two roundings of relative
# size eps at each folded value, carried through at most `layers` layers. 64 leaves room for what
# norms and softmax amplify; 30 layers of float32 were measured at 2e-6, a wrong fold is above 0.1.
FOLD_ROUNDINGS = 64
LARGEST_FOLD_ERROR = 0.05  # where 16-bit models would be allowed more than that
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def fold_error(folded: ReferenceLogits, reference: ReferenceLogits) -> float:
    """Largest change of a logit by folding, over the largest logit, on the same windows."""
    originals = [logits for _, logits in reference]  # one session at a time in memory
    largest = 0.0
    for (_, after), before in zip(folded, originals, strict=True):
        size = float(np.abs(before).max()) or 1.0
        largest = max(largest, float(np.abs(after - before).max()) / size)
    return largest


def fold_tolerance(dtypes: Iterable[str], layers: int) -> float:
    """How much of their size logits may change by rounding alone."""
    epsilon = max(_EPSILON[dtype] for dtype in dtypes)
    return min(FOLD_ROUNDINGS * (layers + 1) * epsilon, LARGEST_FOLD_ERROR)


def check_fold(error: float, dtypes: Iterable[str], layers: int, what: str) -> None:
    """Refuse a rewritten float model that is not the same function.

    Args:
        error: From `fold_error`.
        dtypes: Of the weights.
        layers: Decoder layers.
        what: The rewrite, for the message.

    Raises:
        VerificationError: The logits changed by more than rounding.
    """
    tolerance = fold_tolerance(dtypes, layers)
    if not error <= tolerance:
        msg = (
            f"{what} changed the float model's logits by {error:.2g} of their size (at most "
            f"{tolerance:.0e} is rounding): this graph shares or hides something that the "
            "analysis did not see. Use --method rtn without --rotate, and please report the model"
        )
        raise VerificationError(msg)


def compare_to_reference(
    model: Path, reference: ReferenceLogits, progress: Progress
) -> LogitMetrics:
    """KL, top-1 and perplexities of a written model against the float logits."""
    session = open_session(model)
    comparison = LogitComparison()
    with progress.stage("compare with the float model", len(reference.windows), "windows") as step:
        for ids, logits in reference:
            feeds = decoder_feeds(session.get_inputs(), ids)
            name = reference.output if reference.output in _names(session) else "logits"
            ours = run_session(session, feeds, [name])[name]
            comparison.add(logits, np.asarray(ours, np.float32), ids)
            step(1)
    return comparison.metrics()


def verify_file(
    path: Path,
    logits: LogitMetrics | None,
    sites: Sequence[SiteError],
    error: float | None,
    progress: Progress,
) -> VerificationReport:
    """Structure and kernels of a written model, joined with what was measured before."""
    return VerificationReport(
        structure=check_structure(path),
        kernels=check_kernels(path, progress=progress),
        logits=logits,
        sites=tuple(sites),
        fold_error=error,
    )


def judge(report: VerificationReport, config: QuantizeConfig, *, force: bool) -> tuple[str, ...]:
    """Raise what makes a result unacceptable; with `force` say it in notes instead.

    Kernels that do not compute what was packed, and logits that are not finite, are never
    accepted.

    Raises:
        VerificationError: Names what is wrong, where, and the way out.
    """
    assert report.structure is not None
    assert report.kernels is not None
    if not report.kernels.worst <= 1:  # nan, too
        msg = (
            f"{report.kernels.worst_node}: the kernel's output differs from the dequantized "
            f"weights by {report.kernels.worst:.1f} times the tolerance; the file is wrong for "
            f"onnxruntime {report.structure.onnxruntime}"
        )
        raise VerificationError(msg)
    if report.logits is not None and not np.isfinite(report.logits.kl_nats):
        msg = "the low-bit model's logits are not finite; try more bits or --accuracy-level 0"
        raise VerificationError(msg)
    complaints = [*_complaints(report, config)]
    if complaints and not force:
        raise VerificationError("; ".join(complaints) + "; --force writes it all the same")
    return tuple(complaints)


def _complaints(report: VerificationReport, config: QuantizeConfig) -> Iterable[str]:
    if report.logits is not None and report.logits.kl_nats > config.verify.max_kl:
        worst = sorted(report.sites, key=lambda site: site.sqnr_db)[:WORST_SITES]
        names = ", ".join(f"{site.site} ({site.sqnr_db:.1f} dB)" for site in worst)
        yield (
            f"KL to the float model is {report.logits.kl_nats:.3f} nats/token, more than --max-kl "
            f"{config.verify.max_kl:g}. Worst sites: {names}. Try {_finer_formats(config)}, "
            f"{_better_method(config)}or --exclude these"
        )
    if _may_change_codes(config) and report.sites:
        same = sum(site.equals_rtn for site in report.sites)
        if same == len(report.sites):
            text = "Calibrate on more or other text, or use" if config.axes.calibrates else "Use"
            yield (
                f"--method {config.method} changed nothing: the codes of all {same} sites equal "
                f"round-to-nearest. {text} --method rtn"
            )


def _finer_formats(config: QuantizeConfig) -> str:
    if config.budget is not None:
        return "a larger --budget"
    return "more --bits, a smaller --block-size, --budget same (other bits in the same bytes)"


def _better_method(config: QuantizeConfig) -> str:
    """A method that comes nearer to the float model, "" where there is none."""
    if config.method is Method.BEST:
        return ""
    return f"--method {Method.BEST if config.method is Method.FAQ_GPTQ else Method.FAQ_GPTQ}, "


def _may_change_codes(config: QuantizeConfig) -> bool:
    """Whether codes should differ from round-to-nearest: at 8 bits by channel scales alone."""
    axes, plain = config.axes, METHODS[Method.RTN]
    moved = (axes.grid, axes.rounding) != (plain.grid, plain.rounding)
    fine = config.bits >= 8 or config.budget is not None  # which may have bought 8 bits for all
    return axes.scales != "none" or (moved and not fine)


def budget_note(trade_off: TradeOff | None, logits: LogitMetrics | None, size: int) -> str:
    """A sentence where the result is outside of the budget, "" where it keeps it.

    A KL is chosen by a prediction, a size with an allowance for the structure of the file.
    """
    if trade_off is None:
        return ""
    if trade_off.kind == "kl" and logits is not None and logits.kl_nats > trade_off.limit:
        # Errors scale alike, so the same factor will be missing again.
        wish = trade_off.limit**2 / logits.kl_nats
        return (
            f"the budget is NOT kept: --budget {trade_off.budget} was predicted to give KL "
            f"{trade_off.chosen.kl:.4g}, but {logits.kl_nats:.4g} nats/token were measured; ask "
            f"for --budget 'kl<={wish * KL_MARGIN:.2g}'"
        )
    if trade_off.kind == "bytes" and size > trade_off.limit:
        wish = 2 * trade_off.limit - size
        return (
            f"the budget is NOT kept: the file has {size} bytes, --budget {trade_off.budget} "
            f"allows {trade_off.limit:.0f}; ask for --budget {wish / 1e6:.6g}MB"
        )
    return ""


def scales_note(config: QuantizeConfig) -> str:
    """A sentence about what scales in 8 bits ask of who loads the model, "" for float ones."""
    if config.block_scales == "float":
        return ""
    return (
        "block scales are multiplied out when the model is loaded: leave onnxruntime's graph "
        "optimizations on, as they are by default; under ORT_DISABLE_ALL its int8 kernels give "
        "wrong numbers"
    )


def slow_note(structure: StructureCheck | None) -> str:
    """A sentence about nodes without a fast kernel, "" if there is none."""
    if structure is None or not structure.slow_nodes:
        return ""
    return (
        f"{len(structure.slow_nodes)} of {structure.nbits_nodes} low-bit nodes have no fast "
        f"kernel in onnxruntime {structure.onnxruntime} (first: {structure.slow_nodes[0]}): their "
        "weights are dequantized on every call; use --accuracy-level 4"
    )


def _names(session: object) -> set[str]:
    return {value.name for value in session.get_outputs()}  # type: ignore[attr-defined]
