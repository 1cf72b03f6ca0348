"""The process that writes an .ort file and the operators it needs.

`python -m faq_onnx.targets._ort_conversion FOLDER LARGEST` turns FOLDER/model.onnx into model.ort
and required_operators.config. It is what `onnxruntime.tools.convert_onnx_models_to_ort` does in
style Fixed for arm, which has no place for LARGEST. A process of its own: those tools change
sys.path and the root logger, and onnxruntime writes warnings to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main"]

FATAL_LEVEL = 4


def main(folder: Path, largest: int) -> None:
    """Convert.

    Args:
        folder: Holds model.onnx; the config names the model relative to it.
        largest: Bytes of the largest constant that may be computed ahead; 0 is any.
    """
    import onnxruntime as ort  # noqa: PLC0415 - only in the child
    from onnxruntime.tools.ort_format_model import create_config_from_models  # noqa: PLC0415

    options = ort.SessionOptions()
    options.log_severity_level = FATAL_LEVEL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "model.ort")
    entries = {"session.save_model_format": "ORT", "session.qdqisint8allowed": "1"}
    if largest:
        entries["optimization.constant_folding_max_output_size_in_bytes"] = str(largest)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(
        str(folder / "model.onnx"),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["NchwcTransformer"],  # a layout of x86 alone
    )
    config = folder / "required_operators.config"
    create_config_from_models([folder / "model.ort"], config, False)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(f"{folder / 'model.ort'}", "model.ort"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
