"""The output folder: written beside its final place, renamed when complete, and loadable."""

from __future__ import annotations

from faq_onnx.targets.genai import check_generation, write_genai_config
from faq_onnx.targets.package import OutputFolder, check_free_space, copy_companions

__all__ = [
    "OutputFolder",
    "check_free_space",
    "check_generation",
    "copy_companions",
    "write_genai_config",
]
