"""What Qualcomm's NPU does not run, by the operators and weights of a model.

Measured with onnxruntime-qnn 2.7.0: nodes named here are left to the CPU, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from faq_onnx.artifacts.target import ModelOutline, OperatorUse, PlannedWeight, Refusal
from faq_onnx.runtime.feeds import InputKind

__all__ = [
    "ARCHITECTURES",
    "LPBQ_WAY_OUT",
    "activation_refusals",
    "form_refusals",
    "graph_refusals",
]

LPBQ_WAY_OUT = (
    "convert the float model with --block-scales lpbq --symmetric, or leave activations=float16"
)

# By architecture of the NPU: a chip that has it, by the number that QNN knows it by.
ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"v69": "36", "v73": "43", "v75": "57", "v79": "69", "v81": "87"}
)

_EXPORT = "export the model with optimum-onnx (`faq-onnx export`)"
_CONVERT = "convert the float model with --target qnn"
_UNFUSED = "convert with --target qnn, or with --no-fuse-attention"
_OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "Attention": _EXPORT,
        "DequantizeLinear": _CONVERT,
        "GatherND": _EXPORT,
        "GroupQueryAttention": _UNFUSED,
        "If": "export the decoder as one graph for all tokens (optimum: not merged)",
        "Loop": _EXPORT,
        "MultiHeadAttention": _EXPORT,
        "Scan": _EXPORT,
        "SkipLayerNormalization": _EXPORT,
        "SkipSimplifiedLayerNormalization": _EXPORT,
    }
)
_MICROSOFT_OPERATORS: Mapping[str, str] = MappingProxyType({"RotaryEmbedding": _UNFUSED})
_NEEDED = (InputKind.TOKENS, InputKind.MASK, InputKind.POSITIONS)


def graph_refusals(outline: ModelOutline) -> Iterator[Refusal]:
    """Inputs that are missing, and operators."""
    missing = [str(kind) for kind in _NEEDED if kind not in outline.inputs]
    if missing:
        yield Refusal(
            place="the model",
            found=f"no input {', '.join(missing)}",
            allowed="decoders with it: in a graph of fixed lengths nothing else tells which slots "
            "of the cache are filled",
            way_out=_EXPORT,
        )
    for use in outline.operators:
        way_out = _way_out(use)
        if way_out is not None:
            others = f" (and {use.count - 1} more)" if use.count > 1 else ""
            yield Refusal(
                place=f"{use.first}{others}",
                found=f"the operator {use.op_type}",
                allowed="what QNN takes whole: plain operators, MatMulNBits, norms",
                way_out=way_out,
            )


def activation_refusals(outline: ModelOutline) -> Iterator[Refusal]:
    """No weight that a product between 16-bit activations takes."""
    formats = [weight.format for weight in outline.weights if weight.kind == "linear"]
    if not any(each is not None and each.block_scales == "lpbq" for each in formats):
        yield Refusal(
            place="activations=16-bit",
            found=f"{len(formats)} weights, none with block scales of lpbq",
            allowed="products of such weights: around others the provider drops the 16 bits",
            way_out=LPBQ_WAY_OUT,
        )


def form_refusals(weight: PlannedWeight) -> Iterator[Refusal]:
    """Forms of MatMulNBits that other tools write."""
    if weight.kind == "linear" and weight.float_zero_points:
        yield Refusal(
            place=weight.place,
            found="float zero points",
            allowed="packed ones, or none",
            way_out=_CONVERT,
        )
    if weight.has_bias:
        yield Refusal(
            place=weight.place,
            found="a bias input",
            allowed="an Add behind the node",
            way_out=_CONVERT,
        )


def _way_out(use: OperatorUse) -> str | None:
    if use.domain == "com.microsoft" and use.op_type in _MICROSOFT_OPERATORS:
        return _MICROSOFT_OPERATORS[use.op_type]
    return _OPERATORS.get(use.op_type)
