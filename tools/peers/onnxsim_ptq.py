"""GPTQ or AWQ of onnxsim on an ONNX file; runs in an environment that has onnxsim and onnxruntime.

    python onnxsim_ptq.py IN.onnx OUT.onnx --method gptq --feeds FOLDER

FOLDER holds one .npz of model inputs per calibration window. Nothing of faq_onnx is imported. What
the tool fixes: blocks of 32, symmetric codes -7 to 7. What it needs and does not say: opset 21 and
shapes of the activations; without them it changes nothing and reports success.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxsim  # type: ignore[import-not-found]
from onnx import shape_inference, version_converter

OPSET = 21


def main() -> None:
    """Quantize one file."""
    args = _parse()
    model = onnx.load(str(args.source))
    if next(one.version for one in model.opset_import if not one.domain) < OPSET:
        model = version_converter.convert_version(model, OPSET)
    model = shape_inference.infer_shapes(model)
    feeds = [dict(np.load(path)) for path in sorted(args.feeds.glob("*.npz"))]
    method = {"gptq": onnxsim.apply_gptq, "awq": onnxsim.apply_awq}[args.method]
    rounded = onnxsim.quantize_weight_only_int4(model)
    quantized = method(model, rounded, calibration_data=feeds)
    _drop_unused(quantized)
    onnx.save(quantized, str(args.output))


def _drop_unused(model: onnx.ModelProto) -> None:
    """Initializers that no node reads: onnxsim leaves the float weights in the file."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=["gptq", "awq"], required=True)
    parser.add_argument("--feeds", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
