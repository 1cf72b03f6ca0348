"""Runtimes that packages are made for: one module each, behind `faq_onnx.targets.protocol`.

Light to import: --help shows the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["DEFAULT_TARGET", "TARGETS"]

# The module of a target has its name, with _ for -, and a class `TARGET`.
TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "genai": "onnxruntime-genai: chat and text generation on CPU and GPU",
        "ort-mobile": "ONNX Runtime Mobile: one .ort file for the CPU of a phone",
        "qnn": "onnxruntime on Qualcomm's NPU (Snapdragon), compiled ahead of time",
        "web": "a static folder with a chat page: onnxruntime-web on WebGPU or WebAssembly",
    }
)
DEFAULT_TARGET = "genai"
