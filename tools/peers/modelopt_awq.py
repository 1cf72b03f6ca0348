"""AWQ of NVIDIA ModelOpt on an ONNX file; runs in an environment that has nvidia-modelopt[onnx].

    python modelopt_awq.py IN.onnx OUT.onnx --block-size 32 --feeds FOLDER

FOLDER holds one .npz of model inputs per calibration window. Nothing of faq_onnx is imported: that
environment does not have it.

- awq_lite with zero points is the best of ModelOpt's calibrated methods on a CPU.
- awqlite_fuse_nodes=False: fusing needs cupy; each weight gets a Mul of its own instead.
- enable_fast_path_using_high_sysram: the same result from one forward pass per window, with all
  activations in memory, instead of one pass per weight and window.
- opset 21 is needed by the 4-bit DequantizeLinear that it writes, and is not seen to by the tool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from modelopt.onnx.quantization.int4 import quantize  # type: ignore[import-not-found]
from onnx import version_converter

OPSET = 21


def main() -> None:
    """Quantize one file."""
    args = _parse()
    model = onnx.load(str(args.source))
    if next(one.version for one in model.opset_import if not one.domain) < OPSET:
        model = version_converter.convert_version(model, OPSET)
    feeds = [dict(np.load(path)) for path in sorted(args.feeds.glob("*.npz"))]
    quantized = quantize(
        model,
        calibration_method=args.method,
        calibration_data_reader=feeds,
        calibration_eps=["cpu"],
        use_external_data_format=False,
        use_zero_point=True,
        block_size=args.block_size,
        nodes_to_exclude=["/lm_head"],
        log_level="WARNING",
        awqlite_fuse_nodes=False,
        enable_fast_path_using_high_sysram=not args.slow_path,
    )
    onnx.save(quantized, str(args.output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--feeds", type=Path, required=True)
    parser.add_argument("--method", default="awq_lite")
    parser.add_argument("--slow-path", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
