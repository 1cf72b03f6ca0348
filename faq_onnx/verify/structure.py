"""Does the file check, does it load, and does every low-bit node run on a fast kernel?"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from faq_onnx.artifacts.verification import StructureCheck
from faq_onnx.errors import VerificationError
from faq_onnx.graph.io import load_model
from faq_onnx.quant.packing import packed_width
from faq_onnx.runtime.log import captured_log
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.nodes import MATMUL, LowBitSpec, low_bit_nodes, matmul_model

__all__ = ["check_structure", "is_slow"]

_LOG = logging.getLogger(__name__)

# The sentence that matmul_nbits.cc logs at INFO when it dequantizes the weights for one call.
SLOW_PATH = "unpacked compute mode"
# Kernels are chosen by layout, not by N; 16 columns make the probe cheap.
PROBE_COLUMNS = 16


def check_structure(path: Path) -> StructureCheck:
    """Check a finished model as a file.

    One node of every distinct layout is run alone with onnxruntime's log captured: the log names
    no node, and only a run tells whether a kernel exists on this machine.

    Raises:
        VerificationError: The onnx checker refuses it.
        ModelError: It is damaged or does not load.
    """
    model = load_model(path)
    _run_checker(path)
    open_session(path)
    nodes = [node for node in low_bit_nodes(model) if node.op_type == MATMUL]
    slow = {spec: is_slow(spec) for spec in dict.fromkeys(node.spec for node in nodes)}
    return StructureCheck(
        ir_version=model.ir_version,
        opset=model.opset_imports.get("", 0),
        onnxruntime=ort.__version__,
        nbits_nodes=len(nodes),
        slow_nodes=tuple(node.name for node in nodes if slow[node.spec]),
    )


def is_slow(spec: LowBitSpec) -> bool:
    """Whether onnxruntime's CPU provider dequantizes such a weight on every call."""
    k_blocks = -(-spec.in_features // spec.block_size)
    dtype = ir.DataType[_IR_NAMES[spec.scale_dtype]].numpy()
    packed = np.zeros((PROBE_COLUMNS, k_blocks, spec.block_size * spec.bits // 8), np.uint8)
    zero_points = None
    if spec.zero_point_dtype == "uint8":
        width = packed_width(k_blocks, spec.bits)
        zero_points = np.zeros((PROBE_COLUMNS, width), np.uint8)
    elif spec.zero_point_dtype:
        zero_points = np.zeros((PROBE_COLUMNS, k_blocks), dtype)
    model = matmul_model(spec, packed, np.ones((PROBE_COLUMNS, k_blocks), dtype), zero_points)
    activation = np.zeros((1, spec.in_features), dtype)
    with captured_log() as log:
        run_session(open_session(model, threads=1, verbose=True), {"A": activation})
    _LOG.debug("%s: slow path %s", spec, SLOW_PATH in log.text)
    return SLOW_PATH in log.text


_IR_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def _run_checker(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        text = " ".join(str(error).split())
        # builders put onnxruntime's fused operators into the default domain; loading checks them
        if "No Op registered for" in text:
            _LOG.info("onnx checker stopped at an operator of onnxruntime: %s", text)
            return
        raise VerificationError(f"{path}: the onnx checker refuses the model: {text}") from error
