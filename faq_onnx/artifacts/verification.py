"""What verification found."""

from __future__ import annotations

from faq_onnx.artifacts.package import AttentionFusion
from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.target import TargetProof

__all__ = ["KernelCheck", "LogitMetrics", "SiteError", "StructureCheck", "VerificationReport"]


class StructureCheck(Record):
    """Does the file load, and does every low-bit node run on a fast kernel?

    Attributes:
        ir_version: Of the file.
        opset: Of the default domain.
        onnxruntime: Version that loaded it.
        nbits_nodes: Number of MatMulNBits nodes.
        slow_nodes: MatMulNBits nodes whose weights are dequantized on every call.
    """

    ir_version: int
    opset: int
    onnxruntime: str
    nbits_nodes: int
    slow_nodes: tuple[str, ...]


class KernelCheck(Record):
    """Kernel output against float64 arithmetic on the dequantized weights.

    `worst` is the largest |kernel - reference| over its derived tolerance; <= 1 passes.
    """

    nodes: int
    worst: float
    worst_node: str


class LogitMetrics(Record):
    """Quantized against float logits over the same tokens.

    Attributes:
        tokens: Positions compared.
        kl_nats: Mean KL(float || quantized), nats/token.
        top1_agreement: Share of positions with the same argmax.
        perplexity_float: Of the source model.
        perplexity: Of the quantized model.
    """

    tokens: int
    kl_nats: float
    top1_agreement: float
    perplexity_float: float
    perplexity: float


class SiteError(Record):
    """Output error of one site on calibration data, through the Gram matrix.

    Attributes:
        site: Its name.
        sqnr_db: 10 log10(E|y|^2 / E|y - y_q|^2); of weights (no Gram) for RTN without calibration.
        equals_rtn: No code differs from plain round-to-nearest.
        shrinkage: How far grid and rounding saw the Gram matrix drawn to its diagonal; None where
            they saw none.
    """

    site: str
    sqnr_db: float
    equals_rtn: bool
    shrinkage: float | None = None


class VerificationReport(Record):
    """All of it.

    Attributes:
        structure: None where the package holds no ONNX file, but another form of the model.
        kernels: Likewise.
        logits: None where there was no source to compare with.
        sites: Likewise.
        fold_error: None where no scales were folded.
        attention: None where none was looked for or found.
        proof: What the target's runtime did; None where no target was asked for.
        changes: What `verify` found otherwise than the package's maker did.
        notes: What else there is to say.
    """

    structure: StructureCheck | None
    kernels: KernelCheck | None
    logits: LogitMetrics | None
    sites: tuple[SiteError, ...]
    fold_error: float | None = None
    attention: AttentionFusion | None = None
    proof: TargetProof | None = None
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
