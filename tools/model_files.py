"""Written models: evaluate one against the float logits, change one, make one with onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure

from faq_onnx.artifacts.weights import WeightStore
from faq_onnx.calibration.walk import ReferenceLogits
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.logits import LogitComparison

__all__ = ["bits_per_weight", "evaluate_file", "set_accuracy_level", "write_onnxruntime_rtn"]


def evaluate_file(name: str, path: Path, reference: ReferenceLogits, level: int) -> Figure:
    """Compare a written model with the float logits."""
    session = open_session(path)
    total, windows = LogitComparison(), []
    for ids, logits in reference:
        output = session.get_outputs()[0].name
        feeds = decoder_feeds(session.get_inputs(), ids)
        ours = np.asarray(run_session(session, feeds, [output])[output], np.float32)
        one = LogitComparison()
        for comparison in (total, one):
            comparison.add(logits, ours, ids)
        windows.append(one.metrics().kl_nats)
    metrics = total.metrics()
    return Figure(
        name=name,
        accuracy_level=level,
        kl_nats=metrics.kl_nats,
        kl_windows=tuple(windows),
        top1=metrics.top1_agreement,
        perplexity=metrics.perplexity,
        perplexity_float=metrics.perplexity_float,
        size_bytes=path.stat().st_size,
        plan_s=0.0,
        quantize_s=0.0,
    )


def bits_per_weight(weights: WeightStore) -> float:
    """Stored bits of all low-bit weights, scales and zero points included, per weight."""
    size = count = 0
    for weight in weights.values():
        size += weight.size_bytes
        count += weight.out_features * weight.in_features
    return 8 * size / max(count, 1)


def set_accuracy_level(model: ir.Model, level: int) -> None:
    """Of every MatMulNBits node."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def write_onnxruntime_rtn(
    source: Path, path: Path, bits: int, block_size: int, level: int
) -> None:
    """The same model through onnxruntime's MatMulNBitsQuantizer (DEFAULT, asymmetric)."""
    import onnx  # noqa: PLC0415 - only this reference needs it
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    settings = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=False, accuracy_level=level, bits=bits
    )
    tool = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=settings)
    tool.process()
    tool.model.save_model_to_file(str(path))
